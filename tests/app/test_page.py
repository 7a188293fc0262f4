"""The page without a browser: what it may touch, what it refuses, and that it is served without the outside."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from packaging.requirements import Requirement
from rich.table import Table

from evolved import fresh_run, save
from ssm_metarl import TrainConfig, train
from ssm_metarl.app import adaptation_tab, evolution_tab, pretrained_tab, server, training_tab, view
from ssm_metarl.app.workspace import MAX_JOBS, Workspace, job_of
from ssm_metarl.cli.job import prepared
from ssm_metarl.cli.main import main
from ssm_metarl.cli.options import Evolve, Train
from ssm_metarl.cli.parsing import parse
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST, CheckpointError
from ssm_metarl.tuning.records import Record

ROOT = Path(__file__).resolve().parents[2]
DEAD_END = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "runs"
    small = {"meta_batch": 2, "episodes": 2, "hidden_dim": 8, "state_dim": 4, "learner_threads": 1}
    train(TrainConfig.for_task("navigation-2d", iterations=1, replay_episodes=2, **small), folder / "point")
    return folder


@pytest.fixture
def workspace(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """One without a cluster."""
    monkeypatch.setattr(Workspace, "jobs", lambda self: [])
    return Workspace(runs)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "point/../../x", ".", "", None, "link", "link/checkpoint_000001"]
)
def test_a_name_that_leads_out_of_the_runs_folder_is_refused(name: str | None, workspace: Workspace) -> None:
    outside = workspace.runs.parent / "outside"
    if not outside.exists():
        shutil.copytree(workspace.runs / "point", outside)
        (workspace.runs / "link").symlink_to(outside)
    assert "link" not in workspace.models()
    with pytest.raises(ValueError, match=r"is not in the runs folder|Choose a model first"):
        workspace.checkpoint(name)


def test_a_run_stands_for_its_best_checkpoint_and_each_can_be_named(workspace: Workspace) -> None:
    assert workspace.models()[-1:] == ["point"]
    assert workspace.checkpoint("point").name == "checkpoint_000001"
    assert workspace.checkpoint("point/checkpoint_000000").name == "checkpoint_000000"
    assert workspace.list_runs("train", []) == ["point"]
    assert workspace.list_runs("evolve", []) == []


def test_a_run_of_a_job_is_listed_before_it_has_a_folder(workspace: Workspace) -> None:
    def job(name: str, command: str, run: Path) -> dict[str, Any]:
        return {"job": name, "command": command, "run_dir": str(run), "status": "RUNNING"}

    new = workspace.runs.resolve() / "new"
    found = [job("2", "train --task bandit", new), job("1", "train", Path("/elsewhere")), job("0", "evolve", new)]
    assert workspace.list_runs("train", found) == ["new", "point"]
    assert workspace.list_runs("evolve", found) == ["new"]
    assert job_of(found, new) == found[0]


def test_more_jobs_than_the_limit_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [{"job": f"job-{i}", "status": "RUNNING", "run_dir": None, "command": ""} for i in range(MAX_JOBS)]
    monkeypatch.setattr(Workspace, "jobs", lambda self: running)
    monkeypatch.setattr(jobs, "submit", lambda *_: pytest.fail("it would have been started"))
    with pytest.raises(ValueError, match=r"jobs run already \(job-0, job-1\)"):
        workspace.start(["train"])
    point = str(workspace.runs.resolve() / "point")
    running[:] = [{"job": "job-2", "status": "RUNNING", "run_dir": point, "command": "train"}]
    with pytest.raises(ValueError, match="point is running already, as job-2"):
        workspace.start(["train", "--resume", "--run-dir", point])
    running.clear()
    with pytest.raises(ValueError, match="No job of point is running"):
        workspace.stop("point")


def test_a_model_is_verified_before_anything_is_shown(workspace: Workspace) -> None:
    shown = pretrained_tab.describe(workspace, "point")
    assert "hidden_dim 8, state_dim 4" in shown
    shutil.copytree(workspace.runs / "point", workspace.runs / "altered")
    weights = workspace.runs / "altered" / "checkpoint_000001" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        pretrained_tab.describe(workspace, "altered")
    shutil.rmtree(workspace.runs / "altered")


def test_a_card_that_nobody_vouches_for_is_text(workspace: Workspace) -> None:
    card = workspace.checkpoint("point") / "card.json"
    card.write_text(json.dumps({"about": "<script>alert(1)</script>", "command": "<b>"}))
    shown = pretrained_tab.describe(workspace, "point")
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    for damaged in ("[", '{"about": ["x"]}', '{"evaluation": {"return": "high"}}'):
        card.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"card\.json"):
            pretrained_tab.describe(workspace, "point")
    card.unlink()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a <b>word</b> is wrong"), "a &lt;b&gt;word&lt;/b&gt; is wrong"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (jobs.JobError("two\nlines"), "two"),
        (KeyError("secret"), "Something went wrong that nobody foresaw; the terminal of the app has the details."),
    ],
)
def test_an_error_is_one_sentence(error: Exception, sentence: str) -> None:
    @view.readable
    def handler() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        handler()
    assert caught.value.message == sentence


def test_what_the_page_trains_is_what_the_command_trains() -> None:
    own = TrainConfig.for_task("cartpole").to_dict()
    options = {name: own[name] for name in training_tab.OPTIONS}
    options |= {"iterations": 7, "inner_lr": 0.25, "replay_episodes": 64}
    words = training_tab.train_command("cartpole", "maml", options)
    parsed = parse(words).options()
    assert isinstance(parsed, Train)
    expected = TrainConfig.for_task("cartpole", algorithm="maml", **options)
    same = {name: value for name, value in expected.to_dict().items() if name not in ("num_workers", "device")}
    assert same.items() <= {**parsed.config.to_dict()}.items()
    with pytest.raises(ValueError, match="inner_steps must be 1 or more"):
        training_tab.train_command("cartpole", "promp", {**options, "inner_steps": 0})
    with pytest.raises(ValueError, match="state_dim must be even"):
        training_tab.train_command("cartpole", "promp", {**options, "state_dim": 7})


def test_what_the_page_evolves_is_what_the_command_evolves(workspace: Workspace) -> None:
    for start in (None, workspace.checkpoint("point")):
        words = evolution_tab.evolve_command(start, "navigation-2d", ["outer_lr", "state_dim"], 2, 1, 2000, 5)
        prepared(words, str(workspace.runs))
        parsed = parse(words).options()
        assert isinstance(parsed, Evolve)
        rules = parsed.evolution
        assert (rules.cycles, rules.proposals, rules.budget, rules.evolve) == (2, 1, 2000, ("outer_lr", "state_dim"))
        assert (parsed.start, parsed.config.experience.seed) == (start, 5)
    with pytest.raises(ValueError, match="evolve must name at least one option"):
        evolution_tab.evolve_command(None, "navigation-2d", [], 1, 1, 0, 0)


def test_a_run_goes_on_from_its_last_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(Workspace, "start", lambda self, command: started.append(command))
    handlers = training_tab.Handlers(workspace)
    assert "resumes, to iteration 5" in handlers.go_on("point", 4, progress=lambda *_, **__: None)
    assert started == [["train", "--resume", "--run-dir", str(workspace.folder("point")), "--iterations", "5"]]
    with pytest.raises(gr.Error, match="no checkpoint in empty"):
        handlers.go_on("empty", 4, progress=lambda *_, **__: None)


def test_a_self_improving_run_goes_on_for_more(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(Workspace, "start", lambda self, command: started.append(command))
    folder = workspace.folder("evolved")
    population = fresh_run(folder)
    population.progress.cycle, population.progress.spent["total"] = 4, 1000
    save(population)
    handlers = evolution_tab.Handlers(workspace)
    assert "to cycle 7" in handlers.go_on("evolved", 3, 500, progress=lambda *_, **__: None)
    handlers.go_on("evolved", 0, 0, progress=lambda *_, **__: None)
    common = ["evolve", "--resume", "--run-dir", str(folder)]
    assert started == [[*common, "--cycles", "7", "--budget", "1500"], [*common, "--cycles", "0", "--budget", "0"]]
    shutil.rmtree(folder)


def test_a_tab_shows_a_self_improving_run(workspace: Workspace) -> None:
    """The checkpoints that it can go back to, accepted and assessed ones first; its race or how far its stretch is."""
    folder = workspace.folder("evolved")
    population = fresh_run(folder, proposals=1)
    back, won = [2, {"seed": 5, "outer_lr": 0.01}], [1, {"inner_lr": 0.04}]
    for number, level, path in ((1, None, []), (2, 0.4, [won]), (3, None, [won]), (4, 0.5, [back])):
        name = f"iteration_{number}"
        same = {"env_steps": 1, "cycle": 0, "config": population.base, "path": [[0, population.base], *path]}
        record = Record(name=name, iteration=number, level=level, **same)
        population.archive[name] = record
        (population.store.checkpoints / name).mkdir()
        (population.store.checkpoints / name / MANIFEST).write_text("{}")
    save(population)
    stamp, show = evolution_tab.look("evolved", folder, None, {})
    assert stamp["kept"] == ["iteration_2", "iteration_4", "iteration_3", "iteration_1"]
    shown = show()
    words = [label for label, _ in shown["checkpoint"]["choices"]]
    assert words[:2] == ["iteration 2 · level 0.400 · accepted inner_lr 0.04", "iteration 4 · level 0.500"]
    assert shown["rollback"]["interactive"] is True
    assert "evolved · no job · cycle 0 of 6 · warm-up: 0 of 2 iterations" in shown["status"]
    assert '<progress value="0" max="2"' in shown["population"]
    assert shown["pictures"] == evolution_tab.WAITING
    assert shown["checkpoint"]["value"] == "iteration_2"
    shutil.rmtree(folder)


def test_a_tab_shows_how_a_run_stands(workspace: Workspace) -> None:
    """Under the names of its components; and a run that has nothing to show yet, too."""
    job = {"status": "RUNNING", "message": "", "command": "train --iterations 9"}
    for name, line in (("point", "point · running · iteration 1 of 9 · return"), ("empty", "empty · Starting…")):
        stamp, show = training_tab.look(name, workspace.folder(name), job, {})
        assert stamp == {"lines": int(name == "point"), "resumable": name == "point"}
        shown = show()
        assert set(shown) == {"status", *training_tab.Shown._fields}
        assert line in shown["status"]
    stamp, show = evolution_tab.look("empty", workspace.folder("empty"), job, {})
    assert stamp == {"time": None, "kept": [], "resumable": False}
    assert set(show()) == {"status", *evolution_tab.Shown._fields}
    assert "checkpoint" not in evolution_tab.look("empty", workspace.folder("empty"), job, stamp)[1]()
    assert "Starting…" in show()["status"]


@pytest.mark.parametrize(("replay", "modes"), [(True, ["none", "standard", "hybrid"]), (False, ["none", "standard"])])
def test_a_model_offers_the_modes_that_it_can(
    replay: bool, modes: list[str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> Any:
        checkpoint = load_checkpoint(path)
        return checkpoint if replay else dataclasses.replace(checkpoint, replay=None)

    monkeypatch.setattr(adaptation_tab, "load_checkpoint", load)
    for had, has in (("hybrid", modes[-1] if replay else "standard"), ("none", "none"), (None, "standard")):
        cart, plane, other, mode, _, _, adapt, compare = adaptation_tab.Handlers(workspace).choose("point", had)
        assert [group["visible"] for group in (cart, plane, other)] == [False, True, False]
        assert (mode["choices"], mode["value"]) == (modes, has)
        assert adapt["interactive"] is compare["interactive"] is True
    assert mode["info"] == (None if replay else adaptation_tab.NO_REPLAY)


def test_the_sliders_set_the_task() -> None:
    physics = [9.0, 1.0, 0.1, 0.5, 10.0]
    parameters = adaptation_tab.task_parameters("cartpole", *physics, -1, 0.3, -0.4, "")
    assert parameters == {**dict(zip(adaptation_tab.LABELS, physics, strict=True)), "direction": -1}
    assert adaptation_tab.task_parameters("navigation-2d", *physics, 1, 0.3, -0.4, "") == {"goal": [0.3, -0.4]}
    assert adaptation_tab.task_parameters("bandit", *physics, 1, 0.3, -0.4, '{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="is not a JSON object"):
        adaptation_tab.task_parameters("bandit", *physics, 1, 0.3, -0.4, "[")


def test_without_an_interval_the_page_shows_a_dash() -> None:
    fresh = {"return": 12.0, "ci_low": None, "ci_high": None}
    summary = {"before": fresh, "after": fresh, "environment_steps": 10, "seconds": 0.1}
    summary |= {"curve": [1.0], "best_step": 0, "parameters": {}}
    assert "–" in adaptation_tab.headline(summary)
    known = {**fresh, "ci_low": 11.0, "ci_high": 13.0}
    shown = adaptation_tab.headline({**summary, "after": known})
    assert "11.0 … 13.0" in shown
    assert "–" not in shown


def test_an_empty_box_is_named() -> None:
    boxes = ["Seed", "Cycles"]
    assert view.numbers(boxes, [3, 4.5]) == [3, 4.5]
    for values, named in (([None, 2], "Seed"), ([2, float("nan")], "Cycles"), ([float("inf"), 2], "Seed")):
        with pytest.raises(ValueError, match=f"^{named}: a number is missing.$"):
            view.numbers(boxes, values)


def test_a_table_of_the_terminal_is_one_of_the_page() -> None:
    table = Table(title="A & B", caption="what\nit says")
    table.add_column("name")
    table.add_column("figure", justify="right")
    table.add_row("<i>", "1.0", style="bold")
    text = view.table_html(table)
    assert '<tr class="best"><td class="left">&lt;i&gt;</td><td class="right">1.0</td></tr>' in text
    assert "<caption>A &amp; B</caption>" in text
    assert "what<br>it says" in text


@pytest.mark.parametrize("count", [0, 1, 399, 400, 401, 3000])
def test_a_long_curve_is_thinned_out_and_keeps_its_end(count: int) -> None:
    seconds = {"total": 2.0, "sample": 1.0, "adapt": 0.5, "update": 0.5, "ray": 0.0}
    lines = [
        {"iteration": i, "env_steps": 1000 * i, "return_by_step": [1.0 * i, 2.0 * i], "seconds": seconds}
        for i in range(1, count + 1)
    ]
    returns, speed, phases = training_tab.curves(lines)
    assert len(speed) <= training_tab.POINTS
    assert (len(returns), len(phases)) == (2 * len(speed), 4 * len(speed))
    assert set(speed["steps/s"]) <= {500}
    assert list(speed["environment steps"])[-1:] == [1000 * count][:count]
    assert speed["environment steps"].is_monotonic_increasing


def test_without_gradio_one_sentence_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "The web interface needs Gradio: pip install 'ssm-metarl[app]'." in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_does_not_load_gradio() -> None:
    program = "import sys, ssm_metarl.cli.main; print('gradio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_a_taken_port_is_one_sentence(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        assert main(["app", "--port", str(free_port), "--storage", str(tmp_path)]) == 2
    assert f"The page cannot listen on 127.0.0.1:{free_port}: Address already in use." in capsys.readouterr().err


@pytest.fixture
def served(workspace: Workspace, free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the page."""
    for name, value in DEAD_END.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    page = server.build(workspace)
    server.launch(page, "127.0.0.1", free_port)
    yield f"http://127.0.0.1:{free_port}/"
    page.close(verbose=False)


def test_the_page_hands_out_no_file_and_takes_none(served: str, runs: Path) -> None:
    def status(path: str, content: bytes | None = None) -> int:
        kind = {"Content-Type": "multipart/form-data; boundary=x"} if content else {}
        try:
            return urllib.request.urlopen(urllib.request.Request(served + path, content, kind), timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    for path in ("/etc/passwd", str(runs.resolve() / "point" / "metrics.jsonl"), str(ROOT / "README.md")):
        assert status(f"gradio_api/file={path}") == 403
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nsomething\r\n--x--\r\n'
    assert status("gradio_api/upload", upload) == 413


def test_the_page_needs_nothing_from_outside(served: str) -> None:
    address = served
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    wanted = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"([^\"]*)\"", text)
    assert wanted
    assert [url for url in wanted if re.match(r"(https?:)?//", url) and not url.startswith(address)] == []
    config = json.loads(urllib.request.urlopen(f"{address}config", timeout=10).read())
    assert config["analytics_enabled"] is False
    assert not any("googleapis" in sheet for sheet in config.get("stylesheets") or [])
    labels = json.dumps(config)
    for title in server.TABS:
        assert title in html.unescape(labels)


def test_what_works_waits_in_a_queue_and_what_looks_does_not(workspace: Workspace) -> None:
    page = server.build(workspace)
    queued = [fn for fn in page.fns.values() if fn.queue]
    assert {fn.name for fn in queued} >= {"assess", "adapt", "compare", "measure", "start", "stop", "go_on", "back"}
    queued = [fn for fn in queued if fn.fn]  # the others are of the browser alone
    limits = {("compute", 1), ("jobs", 1), ("look", 4), ("curves", 1)}
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in queued} == limits
    assert page._queue.max_size == server.WAITING


def test_the_requirements_of_the_space_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["app"]}
    assert {*(ROOT / "app" / "space" / "requirements.txt").read_text().split("\n")} - {""} == wanted
    front = (ROOT / "app" / "space" / "README.md").read_text().split("---")[1]
    facts = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert (facts["sdk"], facts["app_file"]) == ("gradio", "app.py")
    gradio = Requirement(project["optional-dependencies"]["app"][0])
    assert gradio.specifier.contains(facts["sdk_version"])


@pytest.mark.slow
def test_the_space_starts_from_a_copy_and_offline(tmp_path: Path, free_port: int) -> None:
    """As its README says, without an install of the package, and with no way out."""
    line = re.search(r"^cp -r (.*) SPACE/$", (ROOT / "app" / "space" / "README.md").read_text(), re.MULTILINE)
    assert line is not None
    for folder in line[1].split():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "app" / "space").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
    program = f"{hide} import runpy; sys.path.insert(0, '.'); runpy.run_path('app.py', run_name='__main__')"
    environment = {**os.environ, **DEAD_END, "NO_PROXY": "127.0.0.1,localhost", "GRADIO_SERVER_PORT": str(free_port)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 100
        text = ""
        while not text and time.monotonic() < end and process.poll() is None:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{free_port}/", timeout=10).read().decode()
            except OSError:
                time.sleep(0.3)
        assert "SSM-MetaRL" in text, (tmp_path / "log").read_text()
        assert (tmp_path / "runs").is_dir()
    finally:
        process.terminate()
        process.wait(30)
