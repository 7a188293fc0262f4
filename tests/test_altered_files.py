"""A fuzz of altered run folders: whatever is in a file, it is read as it is or refused in one sentence, soon.

Each of `FILES` is altered in turn, signed again where it is in a checkpoint, and everything that reads it does so:
nothing but a ValueError of one sentence comes out, and what is loaded is what the file says.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from altered import Altered, seal
from evolved import REFERENCE, event, fresh_run, race
from ssm_metarl import TrainConfig, train
from ssm_metarl.app import evolution_tab, pretrained_tab, training_tab
from ssm_metarl.app.workspace import Workspace
from ssm_metarl.cli.plots import has_lineage, plot_evolution, plot_run
from ssm_metarl.cli.population import decisions_table, population_view
from ssm_metarl.config import SINCE
from ssm_metarl.distributed.schedule import Schedule
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.evaluation.player import player_of
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import best_return, checkpoints, prune, resolve_checkpoint
from ssm_metarl.storage.run_log import cut_metrics, read_metrics
from ssm_metarl.storage.run_record import read_record, write_record
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.store import RunStore, read_state

CHECKPOINT = "trained/checkpoint_000002"
ARRAYS = ("policy", "optimizer", "replay")
FILES = [
    *(f"{CHECKPOINT}/{name}.safetensors" for name in ARRAYS),
    *(f"{CHECKPOINT}/{name}.json" for name in ("config", "progress", "manifest", "card")),
    "trained/best.json",
    "trained/run.json",
    "trained/metrics.jsonl",
    "trained/evaluation.json",
    "trained/schedule.json",
    "evolved/rsi/state.json",
    "evolved/rsi/events.jsonl",
]

SLOWEST, MOST_MEMORY = 10.0, 600 * 2**20
"""Seconds of reading an altered run folder, and bytes that all readings take at most."""

OPTIONS: dict[str, Any] = {
    "meta_batch": 2, "episodes": 2, "hidden_dim": 6, "state_dim": 4, "num_layers": 1, "learner_threads": 1, "epochs": 1,
    "normalize_observations": True, "scale_rewards": True, "replay_episodes": 4, "iterations": 2, "inner_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_disk() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    """A run of train and one of evolve, with every file that is read."""
    root = tmp_path_factory.mktemp("pristine") / "runs"
    config = TrainConfig.for_task("cartpole", **OPTIONS)
    run = train(config, root / "trained").run_dir
    found = evaluate_checkpoint(run, num_tasks=2, episodes=2).summary()
    (run / "evaluation.json").write_text(json.dumps(found))
    card = {"about": "small", "date": "2026-11-29", "command": "train", "training_seconds": 1.0, "evaluation": found}
    (run / "checkpoint_000002" / "card.json").write_text(json.dumps(card))
    schedule = {"iterations": 2, "weights": "last", "options": [[0, config.to_dict()], [1, {"inner_lr": 0.05}]]}
    (run / "schedule.json").write_text(json.dumps(schedule))
    write_record(run, eval_tasks=2)
    population = fresh_run(root / "evolved", proposals=2)
    events = [
        race(1, won=True),
        race(2, won=False),
        event("stretch", "continued", metrics={"average_return": 0.4}, intervals={}, curve=[0.3, 0.4], checkpoint="a"),
        event("stretch", "rolled back", checkpoint="a", reason="asked for", iteration=2),
        event("race", "failed", member=1, reason="it died"),
    ]
    population.commit(events)
    for path in (root / "trained").glob("events.out*"):
        path.unlink()
    return root


@pytest.fixture(scope="module")
def trainer(pristine: Path) -> Any:
    """One trainer of the run's sizes, into which every altered checkpoint is loaded."""
    trainer = MetaTrainer.of_run(TrainConfig.for_task("cartpole", **OPTIONS))
    yield trainer
    trainer.stop()


def load(runs: Path, trainer: MetaTrainer) -> None:
    """A checkpoint by all that reads one; what comes of it is what its files say."""
    folder = runs / CHECKPOINT
    found = load_checkpoint(folder)
    config, progress = (json.loads((folder / name).read_bytes()) for name in ("config.json", "progress.json"))
    assert json.dumps([found.config, found.progress]) == json.dumps([config["train"], progress])
    for name, arrays in (("policy", found.policy), ("optimizer", found.optimizer)):
        stored = safetensors.numpy.load((folder / f"{name}.safetensors").read_bytes())
        assert {key: each.tobytes() for key, each in arrays.items()} == {k: v.tobytes() for k, v in stored.items()}
    read = TrainConfig.from_checkpoint(found.config).to_dict()
    assert same_json(read, {**SINCE, **config["train"]}), "an option is not what the file says"
    assert same_json(found.spec.to_dict(), config["policy"]), "a size is not what the file says"
    player = player_of(found)
    assert player.trial_episodes == config["train"]["trial_episodes"]
    player.act(np.zeros(found.spec.observation_size, np.float32))
    trainer.load_checkpoint(folder)  # type: ignore[arg-type]
    assert (trainer.meta_iteration, trainer.env_steps) == (progress["iteration"], progress["env_steps"])
    trainer.learner.weights()


def same_json(one: Any, other: Any) -> bool:
    """Equal, types included, so that true is not 1; numbers may be written in two ways."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_json, one, other))
    real = (int, float)
    return one == other and (type(one) is type(other) or (type(one) in real and type(other) in real))


def view(runs: Path, out: Path) -> list[Callable[[], object]]:
    """All else that reads a folder of runs: plots, tables, the page, a resume."""
    run, evolved, workspace = runs / "trained", runs / "evolved", Workspace(runs)
    return [
        lambda: resolve_checkpoint(run),
        lambda: best_return(run),
        lambda: [checkpoints(run), prune(run)],
        lambda: pretrained_tab.describe(workspace, "trained"),
        lambda: pretrained_tab.describe(workspace, CHECKPOINT),
        lambda: training_tab.look("trained", workspace.folder("trained"), None, {})[1](),
        lambda: read_record(run),
        lambda: Schedule.read(run),
        lambda: (
            cut_metrics(Path(shutil.copy(run / "metrics.jsonl", out)), 1)
            if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size < 2**30
            else None
        ),
        lambda: evolution_tab.look("evolved", workspace.folder("evolved"), None, {})[1](),
        lambda: population_view(read_state(evolved), RunStore(evolved).events()),
        lambda: decisions_table(RunStore(evolved).events()),
        lambda: Population.resume(RunStore(evolved), REFERENCE),
    ]


def refused(words: str, read: Callable[[], object]) -> bool:
    """Whether reading fails, which it may with one sentence alone."""
    try:
        read()
    except ValueError as error:
        sentence = str(error)
        assert sentence.strip(), words
        assert "\n" not in sentence.strip(), f"{words}: {sentence}"
        assert len(sentence) < 1500, f"{words}: {sentence[:200]}"
        sentence.encode()
        return True
    except Exception as error:
        raise AssertionError(f"{words}: {error!r}") from error
    return False


def draw(runs: Path, out: Path, name: str) -> list[Callable[[], object]]:
    """The pictures, which take longer, of a file that is in them."""
    if name.endswith(("metrics.jsonl", "evaluation.json")):
        return [lambda: plot_run(runs / "trained", "a run")]
    if name.endswith("events.jsonl"):
        return [lambda: plot_evolution(runs / "evolved", "a run", out)]
    return []


def fuzz(pristine: Path, place: Path, trainer: MetaTrainer, seeds: range, pictures: int) -> None:
    """Alter a file with each seed, read everything, and put it back."""
    altered = Altered(pristine, place / "runs")
    out = place / "out"
    out.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    refusals = dict.fromkeys(FILES, 0)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name = FILES[seed % len(FILES)]
        words = f"seed {seed}, {altered.file(name, rng)}"
        begin = time.monotonic()
        readers = [lambda: load(altered.place, trainer), *view(altered.place, out)]
        readers += draw(altered.place, out, name) if seed % pictures < len(FILES) else []
        outcomes = [refused(words, read) for read in readers]
        refusals[name] += any(outcomes)
        assert time.monotonic() - begin < SLOWEST, words
        altered.restore()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MOST_MEMORY, f"{grown / 2**20:.0f} MiB"
    assert all(refusals.values()), refusals  # the alterations do reach every reader


def test_nothing_is_refused_that_was_not_altered(pristine: Path, tmp_path: Path, trainer: MetaTrainer) -> None:
    altered = Altered(pristine, tmp_path / "runs")
    load(altered.place, trainer)
    readers = [*view(altered.place, tmp_path), lambda: plot_run(altered.place / "trained", "a run")]
    readers.append(lambda: plot_evolution(altered.place / "evolved", "a run", tmp_path))
    for number, read in enumerate(readers):
        assert not refused(f"reader {number}", read)
    assert has_lineage(RunStore(altered.place / "evolved").events())
    assert len(read_metrics(altered.place / "trained")) == 2


@pytest.mark.slow
def test_altered_run_folders(pristine: Path, tmp_path: Path, trainer: MetaTrainer) -> None:
    fuzz(pristine, tmp_path, trainer, range(260), pictures=130)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_altered_run_folders(pristine: Path, tmp_path: Path, trainer: MetaTrainer) -> None:
    fuzz(pristine, tmp_path, trainer, range(1000, 3600), pictures=26)


@pytest.mark.parametrize("name", [f"{CHECKPOINT}/{name}.safetensors" for name in ARRAYS])
@pytest.mark.parametrize("stated", [True, False])
def test_a_sparse_file_of_3_gib_is_refused_without_being_read(
    name: str, stated: bool, pristine: Path, tmp_path: Path
) -> None:
    """Whether or not the manifest says how long the file is to be, and whatever digest it has."""
    altered = Altered(pristine, tmp_path / "runs")
    path = altered.place / name
    with path.open("r+b") as file:
        file.truncate(3 * 2**30)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["bytes"][path.name] = 3 * 2**30
    if not stated:
        manifest.pop("bytes")
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"{path.name} (is too large|does not fit)"):
        load_checkpoint(path.parent)
    assert time.monotonic() - begin < 0.5


def replay_of(run: Path, lengths: np.ndarray, tasks: bytes) -> dict[str, np.ndarray]:
    """The arrays of a replay of zeros, as they must be for the policy of the run."""
    stored = safetensors.numpy.load((run / "replay.safetensors").read_bytes())
    steps, episodes = int(lengths.sum()), len(lengths)
    counts = {name: episodes if name == "last_observations" else steps for name in stored}
    arrays = {name: np.zeros((counts[name], *array.shape[1:]), array.dtype) for name, array in stored.items()}
    capacity = np.array([episodes], np.int64)
    return arrays | {"lengths": lengths, "capacity": capacity, "tasks": np.frombuffer(tasks, np.uint8)}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize(
    ("lengths", "tasks", "sentence"),
    [
        (np.ones(200_000, np.int64), b"[" + b"0," * 199_999 + b"0]", "200,000 episodes are more than 100,000"),
        (np.ones(1, np.int64), b"[[" + b"[]," * 6_000_000 + b"0]]", "'tasks' are of more than 5,000,000 values"),
    ],
)
def test_a_replay_that_grows_manyfold_when_it_is_read_is_refused(
    lengths: np.ndarray, tasks: bytes, sentence: str, declared: bool, pristine: Path, tmp_path: Path
) -> None:
    """Without being read, where its run says that it keeps fewer episodes or has played fewer steps."""
    run = Altered(pristine, tmp_path / "runs").place / CHECKPOINT
    (run / "replay.safetensors").write_bytes(safetensors.numpy.save(replay_of(run, lengths, tasks)))
    if declared:
        config, progress = (json.loads((run / name).read_text()) for name in ("config.json", "progress.json"))
        config["train"]["replay_episodes"], progress["env_steps"] = 100_000, 10**9
        (run / "config.json").write_text(json.dumps(config))
        (run / "progress.json").write_text(json.dumps(progress))
    else:
        sentence = "does not fit the run that config.json and progress.json describe"
    seal(run)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=rf"replay\.safetensors .*{sentence}"):
        load_checkpoint(run)
    assert time.monotonic() - begin < (2.0 if declared else 0.5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 2**10
