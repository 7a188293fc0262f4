"""What a resize costs: return just before and just after it, by three ways to do it.

python benchmarks/resize.py --seeds 0 1 2
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from _report import log, report

from ssm_metarl.algorithms.inputs import policy_inputs
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.resize import resize
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.contents import Checkpoint

TEST_TASKS = 100

RESIZES: Mapping[str, Mapping[str, int]] = {
    "state +25 %": {"state_dim": 40},
    "width +25 %": {"hidden_dim": 80},
    "depth +1": {"num_layers": 2},
    "state -25 %": {"state_dim": 24},
    "state -33 %": {"state_dim": 22},
    "state -50 %": {"state_dim": 16},
    "width -25 %": {"hidden_dim": 48},
    "width -33 %": {"hidden_dim": 42},
    "width -50 %": {"hidden_dim": 32},
}


def slice_copy(loaded: Checkpoint, spec: PolicySpec, seed: int) -> dict[str, Array]:
    """New weights with the old ones in their first rows and columns, as AgileRL's mutations do."""
    policy = SSMPolicy(spec, seed).numpy_weights()
    for name, value in policy.items():
        old = loaded.policy.get(name)
        if old is not None:
            common = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, old.shape, strict=True))
            value[common] = old[common]
    return policy


def measured(seed: int, folder: Path) -> dict[str, list[list[float]]]:
    """Returns before and after one inner step, by resize, for the three ways after one another."""
    config = TrainConfig.for_task("navigation-2d", seed=seed, iterations=12)
    train(config, folder / "run")
    path = folder / "run" / "checkpoint_000012"
    loaded, family = load_checkpoint(path), config.family()
    with Pool(family, loaded.spec) as pool:
        tasks = family.sample(10, np.random.default_rng(0))
        probe = pool.collect(loaded.policy, tasks, [np.random.SeedSequence(i) for i in range(10)], 2)
    inputs = policy_inputs(loaded.spec, probe)
    rows = {"not resized": [returns(path)]}
    for label, change in RESIZES.items():
        spec = replace(loaded.spec, **change)
        kept = resize(loaded.spec, loaded.policy, loaded.optimizer, spec, inputs, seed, probe.resets).policy
        ways = (kept, slice_copy(loaded, spec, seed + 1), SSMPolicy(spec, seed + 1).numpy_weights())
        rows[label] = []
        for policy in ways:
            checkpoint = Checkpoint(spec, {**loaded.config, **change}, loaded.progress, policy, {})
            rows[label].append(returns(save_checkpoint(folder / "resized", checkpoint)))
        log(f"seed {seed}, {label}: {rows[label]}")
    return rows


def returns(checkpoint: Path) -> list[float]:
    """Mean test return before and after one inner step."""
    evaluation = evaluate_checkpoint(checkpoint, num_tasks=TEST_TASKS, steps=1)
    return [float(value) for value in np.nanmean(evaluation.returns, 0)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Resize a trained policy in several ways.

    Attributes:
        seeds: of the trainings.
    """

    seeds: tuple[int, ...] = (0, 1, 2)


def main(options: Options) -> dict[str, Any]:
    """A table: a row a resize, means over seeds."""
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(seed, Path(folder) / str(seed)) for seed in options.seeds]
    rows = []
    for label in found[0]:
        values = np.mean([each[label] for each in found], axis=0)  # [ways, 2]
        rows.append({"name": label, "cells": [round(float(value), 2) for value in values.ravel()]})
    ways = ("function-preserving", "slice copy", "initial weights")
    columns = [f"{way}, {when}" for way in ways for when in ("before a step", "after")]
    title = "Return just after a resize of a trained `navigation-2d` policy"
    return {"title": title, "seeds": list(options.seeds), "columns": columns, "rows": rows}


if __name__ == "__main__":
    report("resize", main(tyro.cli(Options, description=__doc__)))
