"""A schedule of options by meta-iteration, which self-improvement leaves and `train` replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_metarl.checks import check_count, check_keys
from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.documents import SMALL, CheckpointError, decode_json, read_file

MACHINE = ("num_workers", "learner_threads", "device", "sample_timeout_s")
"""Options that say where a run computes, not what."""

SCHEDULE = "schedule.json"
"""Name of its file in a run's folder."""


@dataclass(frozen=True)
class Schedule:
    """The options of a run, some of which change before certain meta-iterations.

    Attributes:
        iterations: meta-iterations of the run.
        start: meta-iteration at which it begins; above 0 where it goes on from a checkpoint.
        config: the options at first.
        changes: options that change, by the meta-iteration before which they do; ascending.
    """

    iterations: int
    start: int
    config: TrainConfig
    changes: Mapping[int, Mapping[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Schedule:
        """Read `schedule.json`.

        Args:
            path: the file, or the folder of the run that it is in.

        Raises:
            ValueError: there is none, or it is damaged; one sentence.
        """
        path = schedule_file(path)
        try:
            return cls.from_dict(decode_json(path, read_file(path, 16 * SMALL)))
        except CheckpointError:
            if path.exists():
                raise
            raise ValueError(f"There is no schedule {path}.") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no schedule of options: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """A schedule of JSON values: "iterations", and "options" as [meta-iteration, {name: value}], the first of which
        has all options. Changes at the first meta-iteration belong to the options at first.

        Raises:
            ValueError: an unknown or missing key, an unknown option or an impossible value.
        """
        check_keys(values, {"iterations", "weights", "options"}, "key")
        if not values.get("options"):
            raise ValueError("it has no options.")
        check_count("iterations", values.get("iterations"), 0)
        merged: dict[int, dict[str, Any]] = {}
        for iteration, options in values["options"]:
            check_count("a meta-iteration", iteration, 0)
            merged.setdefault(iteration, {}).update(options)
        if list(merged) != sorted(merged):
            raise ValueError("its meta-iterations must ascend.")
        start = next(iter(merged))
        for name in ("task", "task_options", "task_ranges", *MACHINE):
            if any(name in changes for at, changes in merged.items() if at != start):
                raise ValueError(f"it changes {name}, which a run cannot.")
        config = TrainConfig.from_checkpoint({**merged.pop(start), "iterations": max(values["iterations"], 1)})
        schedule = cls(values["iterations"], start, config, merged)
        schedule.before(config, values["iterations"] + 1)  # all changes are possible
        return schedule

    def before(self, config: TrainConfig, iteration: int) -> TrainConfig:
        """The options that the changes before a meta-iteration, but not its own, have led to.

        Args:
            config: the options at first, or such as some changes have led to.
            iteration: from `start` on.
        """
        for at, changes in self.changes.items():
            if at < iteration:
                config = config.replace(**changes)
        return config


def schedule_file(path: str | Path) -> Path:
    """The file that a path means: itself, or that of a run's folder."""
    return Path(path) / SCHEDULE if Path(path).is_dir() else Path(path)
