"""Small random policies, a toy environment and its rollouts, for the tests of the algorithms and of the learner."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from hypothesis import strategies as st

from ssm_metarl.algorithms.batch import Batch
from ssm_metarl.algorithms.collect import collect
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.seeds import seed_for

seeds = st.integers(0, 2**32 - 1)

# --- The package --------------------------------------------------------------------------------------------


def package_files() -> set[str]:
    """Paths of the package's files as they install, ``ssm_metarl/algorithms/ssm.py`` and so on."""
    root = Path(__file__).resolve().parents[1]
    return {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root / "ssm_metarl", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }


# --- Policies ---------------------------------------------------------------------------------------------


def make_spec(**options: Any) -> PolicySpec:
    """A small policy's sizes."""
    sizes = {"observation_size": 3, "action_size": 2, "discrete": False, "hidden_dim": 6, "state_dim": 4}
    return PolicySpec(**(sizes | options))


@st.composite
def specs(draw: Any, **fixed: Any) -> PolicySpec:
    """Sizes and forms of every kind."""
    options = {
        "observation_size": st.integers(1, 4),
        "action_size": st.integers(1, 10),
        "discrete": st.booleans(),
        "hidden_dim": st.integers(1, 8),
        "state_dim": st.sampled_from([2, 4, 6]),
        "num_layers": st.integers(0, 3),
        "gated": st.booleans(),
        "inputs": st.sampled_from(["full", "observation"]),
        "initial_std": st.sampled_from([0.1, 0.5, 2.0]),
        "task_size": st.sampled_from([0, 3]),
        "memory_slots": st.sampled_from([0, 0, 3]),
    }
    return PolicySpec(**{name: fixed[name] if name in fixed else draw(each) for name, each in options.items()})


def make_policy(spec: PolicySpec, seed: int = 0, noise: float = 0.3) -> SSMPolicy:
    """A policy with all of its parameters, biases and heads too, moved from where they start."""
    policy = SSMPolicy(spec, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return policy


def task_weights(spec: PolicySpec, tasks: int, seed: int = 0) -> dict[str, Any]:
    """Different weights for each task, [M, ...]."""
    own = [make_policy(spec, seed + task).numpy_weights() for task in range(tasks)]
    return {name: np.stack([weights[name] for weights in own]) for name in own[0]}


def tensors(weights: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights as leaves of a graph."""
    return {name: torch.tensor(value, dtype=dtype).requires_grad_() for name, value in weights.items()}


class _Step(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module.step(*arguments)


def step_with(module: Any, parameters: Mapping[str, torch.Tensor], *arguments: Any) -> Any:
    """``module.step(*arguments)`` with other parameters, as ``functional_call`` is to ``forward``."""
    named = {f"module.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(_Step(module), named, arguments)


# --- The toy environment ----------------------------------------------------------------------------------


class ToyEnv(VectorEnv):
    """Columns that end when they are told to, break when they are told to and count their steps.

    An observation is a start drawn from the column's seed plus the number of steps since; the reward is 1 where the
    action is ``best`` (0 if none is), plus a draw. A task's keys, all optional: ``ends`` (length of each column),
    ``how`` ("terminated" or "truncated"), ``best``, ``nan`` (column, the step from which on, "observation" or
    "reward"), ``raises`` (the step), ``observation_size``.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, tasks: Sequence[dict[str, Any]], columns: int) -> None:
        self.num_envs = len(tasks) * columns
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.rows = [task for task in tasks for _ in range(columns)]
        self.ends = np.array([end for task in tasks for end in task.get("ends", [10**6] * columns)])
        self.size = tasks[0].get("observation_size", 3)
        self.columns = columns

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.generators = [np.random.default_rng(column) for column in seed]
        self.starts = np.stack([generator.normal(size=self.size) for generator in self.generators])
        self.clocks = np.zeros(self.num_envs)
        self.steps = 0
        return self.observe(), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        self.clocks += 1
        if any(self.steps == task.get("raises") for task in self.rows):
            raise RuntimeError("the toy is broken")
        # Where an action is continuous, its first number's sign is what counts.
        chosen = actions if actions.ndim == 1 else (actions[:, 0] > 0).astype(int)
        draws = [0.1 * generator.normal() for generator in self.generators]
        best = np.array([task.get("best", -1) for task in self.rows])
        rewards = self.spoil((chosen == best) + np.array(draws), "reward")
        observations = self.observe()
        done = self.clocks >= self.ends
        terminated = done & np.array([task.get("how", "terminated") == "terminated" for task in self.rows])
        info: dict[str, Any] = {}
        if done.any():
            info = {"final_obs": np.array([*observations, None], object)[:-1], "_final_obs": done}
            self.clocks[done] = 0
            observations = np.where(done[:, None], self.observe(), observations)
        return observations, rewards, terminated, done & ~terminated, info

    def observe(self) -> Any:
        return self.spoil(self.starts + self.clocks[:, None], "observation").astype(np.float32)

    def spoil(self, values: Any, where: str) -> Any:
        values = np.array(values, np.float64)
        for index, task in enumerate(self.rows):
            column, step, what = task.get("nan", (None, 0, None))
            if (column, what) == (index % self.columns, where) and self.steps >= step:
                values[index] = np.nan
        return values


def toy_rollouts(
    spec: PolicySpec,
    weights: Mapping[str, Any],
    tasks: Sequence[dict[str, Any]],
    columns: int,
    horizon: int,
    seed: int = 0,
) -> Rollouts:
    """Experience of toy tasks."""
    tasks = [{"observation_size": spec.observation_size, **task} for task in tasks]
    nodes = [seed_for(seed, task) for task in range(len(tasks))]
    return collect(ToyEnv(tasks, columns), spec, weights, nodes, tasks, horizon)


def uneven(tasks: int, columns: int, horizon: int, seed: int = 0) -> list[dict[str, Any]]:
    """Toy tasks whose episodes have all lengths from 1 to beyond the horizon."""
    lengths = np.random.default_rng(seed).integers(1, horizon + 3, (tasks, columns))
    return [{"ends": row, "best": task % 2} for task, row in enumerate(lengths.tolist())]


# --- Records ----------------------------------------------------------------------------------------------

ARRAYS = tuple(field.name for field in fields(Rollouts) if field.name not in ("tasks", "errors"))


def spoil(record: Rollouts, seed: int = 0) -> Rollouts:
    """A record with garbage in everything that is not valid."""
    rng = np.random.default_rng(seed)
    garbage = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32)
    arrays = {}
    for name in ARRAYS[:-2]:
        array = getattr(record, name)
        wrong = rng.choice(garbage, array.shape)
        if array.dtype == np.int64:
            wrong = rng.choice([-7, 10**6], array.shape)
        if array.dtype == bool:
            wrong = rng.random(array.shape) < 0.5
        arrays[name] = np.where(record.valid[..., None] if array.ndim == 4 else record.valid, array, wrong)
    lost = ~record.kept()[..., None]
    arrays["last_observations"] = np.where(lost, np.float32(np.nan), record.last_observations)
    return replace(record, **arrays)


def drop(record: Rollouts, task: int, column: int | slice = slice(None)) -> Rollouts:
    """A record that lost some episodes of a task."""
    valid = record.valid.copy()
    valid[task, :, column] = False
    return replace(record, valid=valid)


def assert_same(one: Rollouts, other: Rollouts) -> None:
    """Equal to the last bit."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert one.tasks == other.tasks


def double(batch: Batch) -> Batch:
    """A batch in float64."""
    return Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batch))
