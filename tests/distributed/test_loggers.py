"""Where metrics go beside metrics.jsonl: TensorBoard's events, and loggers of Ray Tune for a run outside of Tune."""

from __future__ import annotations

import builtins
import csv
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from ray.tune.logger import LoggerCallback

from builders import events, logged, small_config, tags
from ssm_metarl.distributed.loggers import Board
from ssm_metarl.distributed.train import train

# --- TensorBoard ------------------------------------------------------------------------------------------


def test_the_board_has_options_and_both_returns_on_one_chart(tmp_path: Path, without_ray: None) -> None:
    run = train(small_config(iterations=3, inner_steps=2), tmp_path / "run").run_dir
    found = tags(run)
    assert found["_hparams_/session_start_info"] == [0]
    (layout,) = [
        value.tensor.string_val[0].decode("latin-1")
        for event in events(run)
        for value in event.summary.value
        if value.tag == "custom_scalars__config__"
    ]
    assert all(f"return_by_step/{step}" in layout for step in range(3))
    assert found["return_by_step/2"] == [1, 2, 3]
    train(small_config(iterations=5, inner_steps=2), run, resume=True)
    found = tags(run)
    assert found["return_by_step/2"] == [1, 2, 3, 4, 5]
    assert found["_hparams_/session_start_info"] == [0], "once"


def test_the_board_takes_evaluation_and_pictures(tmp_path: Path) -> None:
    figure, _ = plt.subplots()
    figure.savefig(tmp_path / "curve.png", dpi=30)
    plt.close(figure)
    board = Board(tmp_path, 7)
    summary = {
        "return": [1.0, 2.0],
        "ci_low": [None, 1.5],
        "ci_high": [None, 2.5],
        "episode_length": [3, 3],
        "task": "",
    }
    board.add_results(summary, [tmp_path / "curve.png"])
    board.close()
    found = tags(tmp_path)
    assert found["evaluation/return/0"] == found["evaluation/return/1"] == found["evaluation/ci_low/1"] == [7]
    assert "evaluation/ci_low/0" not in found
    assert found["curve"] == [7]


# --- Loggers of Ray Tune ----------------------------------------------------------------------------------


class Notes(LoggerCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def setup(self, *args: Any, **info: Any) -> None:
        self.notes.append("set up")

    def log_trial_start(self, trial: Any) -> None:
        self.notes.append(("start", str(trial), trial.config["task"], Path(trial.local_path).is_dir()))

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.notes.append((iteration, result["training_iteration"], result["timesteps_total"], result["return_after"]))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self.notes.append(("end", failed))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.notes.append(len(trials))


def test_a_logger_of_tune_takes_the_run_for_a_trial(tmp_path: Path, without_ray: None) -> None:
    notes = Notes()
    run = train(small_config(iterations=2), tmp_path / "run", loggers=[notes]).run_dir
    lines = logged(run)
    assert notes.notes == [
        "set up",
        ("start", "run", small_config().task, True),
        *((i + 1, i + 1, line["env_steps"], line["return_by_step"][-1]) for i, line in enumerate(lines)),
        ("end", False),
        1,
    ]
    assert not list(run.glob("events*"))


def test_a_table_of_the_run_goes_on_when_it_is_resumed(tmp_path: Path, without_ray: None) -> None:
    run = train(small_config(iterations=2), tmp_path / "run", loggers=["csv"]).run_dir
    train(small_config(iterations=3), run, resume=True, loggers=["csv"])
    with (run / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = logged(run)
    assert [int(row["training_iteration"]) for row in rows] == [1, 2, 3]
    assert [float(row["return_after"]) for row in rows] == [line["return_by_step"][-1] for line in lines]
    assert [float(row["seconds/update"]) for row in rows] == [line["seconds"]["update"] for line in lines]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = builtins.__import__

    def missing(package: str, *args: Any, **more: Any) -> Any:
        if package == name:
            raise ModuleNotFoundError(package)
        return found(package, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=rf"--log {name} needs a package: pip install 'ssm-metarl\[{name}\]'\.$"):
        train(small_config(), tmp_path / "run", loggers=[name])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="log must be one of tensorboard, csv, wandb, mlflow, not 'tensorbord'"):
        train(small_config(), tmp_path / "run", loggers=["tensorbord"])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_start_is_one_sentence(tmp_path: Path, without_ray: None) -> None:
    class Unreachable(Notes):
        def setup(self, *args: Any, **info: Any) -> None:
            raise ConnectionError("no server here\nmore")

    with pytest.raises(ValueError, match=r"^Unreachable cannot start: no server here$"):
        train(small_config(), tmp_path / "run", loggers=[Unreachable()])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_weights_and_biases_and_mlflow_work_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = train(small_config(iterations=3), tmp_path / "run", loggers=["mlflow", "wandb"]).run_dir
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"return_after" in kept.read_bytes()
    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "ssm-metarl"]
    (found,) = client.search_runs([experiment.experiment_id])
    values = [metric.value for metric in client.get_metric_history(found.info.run_id, "return_after")]
    assert values == pytest.approx([line["return_by_step"][-1] for line in logged(run)])
    assert found.info.status == "FINISHED"
    assert found.data.params["task"] == small_config().task
    assert os.path.isfile(run / "mlflow.db")
