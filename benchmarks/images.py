"""Microseconds of one step of one environment in a worker, with a vector or an image as the observation.

python benchmarks/images.py

On one core, with several episodes side by side: the default policy, and convolutions alone, in NumPy.
"""

from __future__ import annotations

import os
import time

os.environ |= {"OMP_NUM_THREADS": "1"}

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tyro
from _report import report

from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.config import TrainConfig
from ssm_metarl.tasks import make

VECTOR, SMALL, LARGE = (4,), (16, 16, 3), (84, 84, 3)
Layer = tuple[int, int, int]  # filters, their side, stride

NETWORKS: dict[str, tuple[tuple[int, int, int], Sequence[Layer]]] = {
    "16 × 16 × 3: two convolutions": (SMALL, [(16, 3, 2), (32, 3, 2)]),
    "84 × 84 × 3: two convolutions of DQN": (LARGE, [(16, 8, 4), (32, 4, 2)]),
    "84 × 84 × 3: three convolutions of DQN": (LARGE, [(32, 8, 4), (64, 4, 2), (64, 3, 1)]),
}
"""Image and layers, of Mnih et al. 2013 (arXiv 1312.5602) and 2015 those of DQN."""

OBSERVATIONS: dict[str, tuple[int, ...]] = {
    "4 numbers: policy": VECTOR,
    "16 × 16 × 3: policy": SMALL,
    "4,096 numbers: policy": (4096,),
    "84 × 84 × 3: policy": LARGE,
}


STEPS = 20
"""That are timed at once."""


@dataclass(frozen=True)
class Options:
    """Time a step with each observation.

    Attributes:
        episodes: that a worker plays side by side.
        repetitions: measured turns; the least counts.
    """

    episodes: int = 20
    repetitions: int = 100


def policy_step(size: int, episodes: int) -> Callable[[], object]:
    """A step of the default policy with observations of a size."""
    spec = replace(TrainConfig().policy_spec(make("cartpole")), observation_size=size)
    policy = NumpyPolicy(spec, SSMPolicy(spec).numpy_weights())
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, episodes, spec.input_size)).astype(np.float32)
    state, noise = policy.initial_state(1, episodes), rng.random((1, episodes), np.float32)
    return lambda: policy.act(inputs, state, noise)


def convolutions(shape: tuple[int, int, int], layers: Sequence[Layer], episodes: int) -> Callable[[], object]:
    """A step of convolutions with rectified outputs; each is one matrix product over all patches."""
    rng, channels = np.random.default_rng(0), shape[-1]
    image = rng.random((episodes, *shape), np.float32)
    weights = []
    for filters, side, _ in layers:
        weights.append(rng.normal(size=(channels * side * side, filters)).astype(np.float32))
        channels = filters

    def step() -> Array:
        hidden = image
        for weight, (filters, side, stride) in zip(weights, layers, strict=True):
            patches = np.lib.stride_tricks.sliding_window_view(hidden, (side, side), (1, 2))[:, ::stride, ::stride]
            rows, columns = patches.shape[1:3]
            hidden = np.maximum(patches.reshape(-1, len(weight)) @ weight, 0).reshape(episodes, rows, columns, filters)
        return hidden

    return step


def processor_seconds(step: Callable[[], object]) -> float:
    """Of a step, from several in a row after one that fills the caches."""
    step()
    begin = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - begin) / STEPS


def main(options: Options) -> dict[str, Any]:
    """A row an observation and what reads it."""
    works = {name: policy_step(int(np.prod(shape)), options.episodes) for name, shape in OBSERVATIONS.items()}
    works |= {name: convolutions(*network, options.episodes) for name, network in NETWORKS.items()}
    seconds = dict.fromkeys(works, np.inf)
    for _ in range(options.repetitions):  # in turns, so that all meet the same disturbances
        seconds = {name: min(seconds[name], processor_seconds(step)) for name, step in works.items()}
    found = {name: least / options.episodes * 1e6 for name, least in seconds.items()}
    least = next(iter(found.values()))
    steps, (height, width, channels) = 20 * 20 * 100, LARGE
    return {
        "title": "One step of one environment in a worker, by observation",
        "columns": ["μs", "times that of a vector"],
        "rows": [{"name": name, "cells": [value, value / least]} for name, value in found.items()],
        "batch_gigabytes": steps * height * width * channels * 4 / 1e9,
        "notes": [
            f"{options.episodes} episodes side by side; processor time, the least of {options.repetitions} turns.",
            "The policy has the default sizes, and takes an image flattened. Convolutions are without it, in NumPy.",
        ],
    }


if __name__ == "__main__":
    report("images", main(tyro.cli(Options, description=__doc__)))
