"""Where a run's metrics go beside `metrics.jsonl`: TensorBoard, and whatever logs trials of Ray Tune."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ray.tune.logger import CSVLoggerCallback, LoggerCallback
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars, hparams, image

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.metrics import DETAILS
from ssm_metarl.storage.run_record import read_record

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
LOGGERS: tuple[LoggerName, ...] = get_args(LoggerName)
"""Names of the loggers: TensorBoard's events, Tune's `progress.csv`, Weights & Biases, and MLflow."""

PROJECT = "ssm-metarl"
"""Of runs at Weights & Biases, unless WANDB_PROJECT names another."""


class RunLogger(Protocol):
    """Takes the metrics of a run."""

    def start(self, config: TrainConfig) -> None:
        """Begin, or go on with, a run."""

    def add(self, metrics: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        """An iteration's metrics, as of `Trainer.step` and as a line of `metrics.jsonl`."""

    def close(self) -> None:
        """The end."""


class Board:
    """TensorBoard's events of a run.

    Args:
        run: the folder.
        iteration: that was finished last; what is in the events after it is void.
    """

    def __init__(self, run: Path, iteration: int) -> None:
        # Not SummaryWriter: its thread dies of a full disk, and the run would wait for it without end.
        self._events = EventsWriter(str(run / "events"), f".{iteration}")
        self._iteration = iteration
        self._write(step=iteration + 1, session_log=SessionLog(status=SessionLog.START))

    def start(self, config: TrainConfig) -> None:
        """The options, and a chart with the returns before and after adaptation in one."""
        if self._iteration:
            return
        returns = [f"return_by_step/{step}" for step in range(config.meta.inner_steps + 1)]
        options = {name: _hyperparameter(value) for name, value in config.to_dict().items()}
        for summary in hparams(options, {returns[-1]: 0.0}):
            self._write(step=0, summary=summary)
        layout = {"return": {"by adaptation step": ["Multiline", returns]}}
        self._write(step=0, summary=custom_scalars(layout))

    def add(self, metrics: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        """Every number of the line, by name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _scalars(line)]
        self._write(step=line["iteration"], summary=Summary(value=values))
        self._events.flush()

    def add_results(self, evaluation: Mapping[str, Any], pictures: Sequence[Path]) -> None:
        """What is known at the end: an evaluation's summary, and pictures (PNG)."""
        from matplotlib.image import imread

        kept = {name: evaluation[name] for name in ("return", "ci_low", "ci_high", "episode_length")}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _scalars({"evaluation": kept})]
        self._write(step=self._iteration, summary=Summary(value=values))
        for path in pictures:
            self._write(step=self._iteration, summary=image(path.stem, imread(path)[..., :3], dataformats="HWC"))

    def close(self) -> None:
        """Write what is not written yet."""
        self._events.close()

    def _write(self, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **content))


@dataclass(eq=False)
class _AsTrial:
    """A run as Tune's loggers see a trial."""

    trial_id: str
    config: dict[str, Any]
    local_path: str
    experiment_dir_name: str
    evaluated_params: dict[str, Any] = field(default_factory=dict)
    checkpoint: None = None

    def init_local_path(self) -> None:
        """Nothing: the run's folder is there."""

    def __str__(self) -> str:
        return Path(self.local_path).name


class TuneLogger:
    """A logger of Ray Tune, which takes the run for a trial.

    Args:
        callback: such as `WandbLoggerCallback`, not set up.
        run: the folder.
    """

    def __init__(self, callback: LoggerCallback, run: Path) -> None:
        self._callback, self._run = callback, run.resolve()
        self._trial: Any = None

    def start(self, config: TrainConfig) -> None:
        """Set it up, and tell it of the run."""
        number = read_record(self._run).get("id", self._run.name)
        trial = _AsTrial(number, config.to_dict(), str(self._run), config.task.replace(":", "_"))
        try:
            self._callback.setup()
            self._callback.log_trial_start(trial)
        except Exception as error:  # each has its own
            sentence = str(error).strip().splitlines()[0]
            raise ValueError(f"{type(self._callback).__name__} cannot start: {sentence}") from error
        self._trial = trial

    def add(self, metrics: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        """The iteration's numbers, under the names that they have in Tune."""
        result = {name: value for name, value in metrics.items() if name != DETAILS}
        result |= {"training_iteration": metrics["iteration"], "timesteps_total": metrics["env_steps"]}
        self._callback.log_trial_result(metrics["iteration"], self._trial, result)

    def close(self) -> None:
        """Tell it that the run ended."""
        if self._trial is not None:
            self._callback.log_trial_end(self._trial)
            self._callback.on_experiment_end([self._trial])


def tune_loggers(loggers: Sequence[LoggerName | LoggerCallback], run: Path) -> list[LoggerCallback | None]:
    """The loggers of Ray Tune that are asked for; None stands for TensorBoard, which has its own.

    Args:
        loggers: names, or loggers of Ray Tune, not set up.
        run: the folder, which need not be there yet.

    Raises:
        ValueError: an unknown name, or a package that is not installed; one sentence.
    """
    return [each if isinstance(each, LoggerCallback) else tune_logger(each, run) for each in loggers]


def open_loggers(
    callbacks: Sequence[LoggerCallback | None], run: Path, iteration: int, config: TrainConfig
) -> list[RunLogger]:
    """Begin to log a run.

    Args:
        callbacks: see `tune_loggers`.
        run: the folder.
        iteration: that was finished last.
        config: of the run.

    Raises:
        ValueError: a logger cannot start; one sentence. Those that were started have ended.
    """
    with ExitStack() as started:
        opened: list[RunLogger] = []
        for callback in callbacks:
            logger: RunLogger = Board(run, iteration) if callback is None else TuneLogger(callback, run)
            started.callback(logger.close)
            logger.start(config)
            opened.append(logger)
        started.pop_all()
    return opened


def tune_logger(name: str, run: Path) -> LoggerCallback | None:
    """The logger of Ray Tune of a name; None for "tensorboard", which has its own.

    Raises:
        ValueError: an unknown name, or a package that is not installed; one sentence.
    """
    if name not in LOGGERS:
        raise ValueError(f"log must be one of {', '.join(LOGGERS)}, not {name!r}.")
    try:
        if name == "wandb":
            import wandb  # noqa: F401
            from ray.air.integrations.wandb import WandbLoggerCallback

            # It runs in an actor, which on a cluster does not see the variables of this process.
            mode = {"mode": os.environ["WANDB_MODE"]} if os.environ.get("WANDB_MODE") else {}
            return WandbLoggerCallback(os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", **mode)
        if name == "mlflow":
            import mlflow  # noqa: F401
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve() / 'mlflow.db'}"
            return MLflowLoggerCallback(place, experiment_name=PROJECT)
    except ModuleNotFoundError:
        raise ValueError(f"--log {name} needs a package: pip install 'ssm-metarl[{name}]'.") from None
    return CSVLoggerCallback() if name == "csv" else None


def needs_ray(callbacks: Sequence[LoggerCallback | None]) -> bool:
    """Whether a logger runs in an actor: that of Weights & Biases does."""
    given = [each for each in callbacks if each is not None]
    if not given:
        return False
    from ray.air.integrations.wandb import WandbLoggerCallback

    return any(isinstance(each, WandbLoggerCallback) for each in given)


def _hyperparameter(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line by TensorBoard tag; lists of numbers by index."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars(
                {str(i): x for i, x in enumerate(value) if isinstance(x, int | float)}, f"{prefix}{name}/"
            )
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
