"""Small random policies, rollouts of a toy environment, checkpoints and runs, as several test files need them."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from ssm_metarl.algorithms.batch import Batch, make_batch
from ssm_metarl.algorithms.collect import collect, played
from ssm_metarl.algorithms.inner_loop import adapt_weights
from ssm_metarl.algorithms.parameters import expected_shapes
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import MetaConfig
from ssm_metarl.algorithms.rollouts import Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.seeds import seed_for
from ssm_metarl.storage.contents import Checkpoint

seeds = st.integers(0, 2**32 - 1)

# --- The package --------------------------------------------------------------------------------------------


def package_files() -> set[str]:
    """Paths of the package's files as they install, `ssm_metarl/algorithms/ssm.py` and so on."""
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
        "separate_critic": st.booleans(),
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


# --- The toy environment ----------------------------------------------------------------------------------


class ToyEnv(VectorEnv):
    """Columns that end when they are told to, break when they are told to and count their steps.

    An observation is a start drawn from the slot's seed plus the number of steps since; the reward is 1 where the
    action is `best` (0 if none is), plus a draw. A task's keys, all optional: `ends` (length of each slot),
    `how` ("terminated" or "truncated"), `best`, `nan` (slot, the step from which on, "observation" or
    "reward"), `raises` (the step), `observation_size`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, tasks: Sequence[dict[str, Any]], num_episodes: int) -> None:
        self.num_envs = len(tasks) * num_episodes
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.rows = [task for task in tasks for _ in range(num_episodes)]
        self.ends = np.array([end for task in tasks for end in task.get("ends", [10**6] * num_episodes)])
        self.size = tasks[0].get("observation_size", 3)
        self.num_episodes = num_episodes

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.generators = [np.random.default_rng(slot) for slot in seed]
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
            slot, step, what = task.get("nan", (None, 0, None))
            if (slot, what) == (index % self.num_episodes, where) and self.steps >= step:
                values[index] = np.nan
        return values


def toy_rollouts(
    spec: PolicySpec,
    weights: Mapping[str, Any],
    tasks: Sequence[dict[str, Any]],
    num_episodes: int,
    horizon: int,
    seed: int = 0,
) -> Rollouts:
    """Experience of toy tasks."""
    tasks = [{"observation_size": spec.observation_size, **task} for task in tasks]
    nodes = [seed_for(seed, task) for task in range(len(tasks))]
    return played(collect(ToyEnv(tasks, num_episodes), spec, weights, nodes, tasks, horizon))


def uneven(tasks: int, num_episodes: int, horizon: int, seed: int = 0) -> list[dict[str, Any]]:
    """Toy tasks whose episodes have all lengths from 1 to beyond the horizon."""
    lengths = np.random.default_rng(seed).integers(1, horizon + 3, (tasks, num_episodes))
    return [{"ends": row, "best": task % 2} for task, row in enumerate(lengths.tolist())]


# --- Records ----------------------------------------------------------------------------------------------

ARRAYS = tuple(field.name for field in fields(Rollouts) if field.name not in ("tasks", "errors", "successes"))


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


def drop(record: Rollouts, task: int, slot: int | slice = slice(None)) -> Rollouts:
    """A record that lost some episodes of a task."""
    valid = record.valid.copy()
    valid[task, :, slot] = False
    return replace(record, valid=valid)


def assert_same(one: Rollouts, other: Rollouts) -> None:
    """Equal to the last bit."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert one.tasks == other.tasks
    np.testing.assert_array_equal(one.successes, other.successes)  # type: ignore[arg-type]


def double(batch: Batch) -> Batch:
    """A batch in float64."""
    return Batch(*(x.double() if x is not None and x.is_floating_point() else x for x in batch))


# --- Stages and gradients -----------------------------------------------------------------------------------

TASKS, NUM_EPISODES, HORIZON = 3, 4, 5
"""Sizes of `experience`."""


def experience(config: MetaConfig, spec: PolicySpec, seed: int = 0) -> tuple[SSMPolicy, list[Batch]]:
    """A policy, and the batches of every stage, collected with what it had adapted to by then."""
    policy = make_policy(spec, seed, noise=0.2)
    weights: dict[str, Any] = policy.numpy_weights()
    stages = []
    for stage in range(config.inner_steps + 1):
        tasks = uneven(TASKS, NUM_EPISODES, HORIZON, seed)
        record = toy_rollouts(spec, weights, tasks, NUM_EPISODES, HORIZON, seed + 100 * stage)
        stages.append(make_batch(spec, record, config))
        weights = adapt_weights(policy, weights, stages[-1], config)
    return policy, stages


def exact(config: MetaConfig, spec: PolicySpec, seed: int = 0) -> tuple[SSMPolicy, dict[str, Any], list[Batch]]:
    """The same in float64, with the parameters as leaves."""
    policy, stages = experience(config, spec, seed)
    return policy.double(), tensors(policy.numpy_weights(), torch.float64), [double(stage) for stage in stages]


def recorded(seed: int, **options: Any) -> tuple[SSMPolicy, dict[str, Any], Rollouts]:
    """A policy, different weights for each of three tasks, and what these played: two episodes of up to nine steps."""
    spec = make_spec(**options)
    weights = task_weights(spec, 3, seed)
    return make_policy(spec, seed), weights, toy_rollouts(spec, weights, uneven(3, 2, 9, seed), 2, 9, seed)


def gradient(loss: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Derivatives of a loss, 0 where it does not depend on a parameter; the graph is kept."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(parameters.items(), gradients, strict=True)
    }


def norm(gradients: Mapping[str, Any]) -> float:
    """Of all of them together."""
    return math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Name by name."""
    return {name: one[name] - other[name] for name in one}


def assert_close(one: Mapping[str, Any], other: Mapping[str, Any], **tolerance: float) -> None:
    """Tensors, name by name."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_equal_arrays(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """The same names, and their arrays equal to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- Checkpoints ------------------------------------------------------------------------------------------

CONTENT = ("policy.safetensors", "optimizer.safetensors", "config.json", "progress.json")
FILES = (*CONTENT, "manifest.json")
"""Of a checkpoint without a replay."""

plain_specs = st.builds(
    PolicySpec,
    observation_size=st.integers(1, 5),
    action_size=st.integers(1, 4),
    discrete=st.booleans(),
    hidden_dim=st.integers(1, 9),
    state_dim=st.integers(1, 5).map(lambda pairs: 2 * pairs),
    num_layers=st.integers(0, 3),
    gated=st.booleans(),
    inputs=st.sampled_from(["full", "observation"]),
    initial_std=st.floats(1e-3, 10.0),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make_checkpoint(seed: int = 0, spec: PolicySpec | None = None, **changes: Any) -> Checkpoint:
    """A checkpoint of random numbers, all of which depend on the seed."""
    spec = spec or PolicySpec(3, 2, discrete=False, hidden_dim=4, state_dim=4)
    rng = np.random.default_rng(seed)
    policy = {name: rng.normal(size=shape).astype(np.float32) for name, shape in expected_shapes(spec).items()}
    optimizer = {f"{name}.exp_avg": rng.normal(size=a.shape).astype(np.float32) for name, a in policy.items()}
    optimizer |= {f"{name}.exp_avg_sq": rng.random(a.shape, dtype=np.float32) for name, a in policy.items()}
    optimizer |= {f"{name}.step": np.asarray(seed, np.float32) for name in policy}
    config = {"seed": seed, "task": "navigation-2d", "step_weights": [0.0, 1.0]}
    checkpoint = Checkpoint(spec, config, {"iteration": seed, "env_steps": 40_000 * seed}, policy, optimizer)
    return replace(checkpoint, **changes)


def assert_same_checkpoint(one: Checkpoint, other: Checkpoint) -> None:
    """Equal to the bit, types included."""
    assert one.spec == other.spec
    assert json.dumps([one.config, one.progress]) == json.dumps([other.config, other.progress])
    for ours, theirs in ((one.policy, other.policy), (one.optimizer, other.optimizer)):
        assert set(ours) == set(theirs)
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert array.shape == theirs[name].shape
            assert array.tobytes() == theirs[name].tobytes()


# --- Runs -------------------------------------------------------------------------------------------------

SMALL = {"meta_batch": 4, "episodes": 3, "hidden_dim": 16, "state_dim": 8, "learner_threads": 1, "epochs": 1}
"""Options of a run whose iterations take milliseconds."""

PNG = b"\x89PNG\r\n"
"""How a picture's file begins."""


def small_config(task: str = "navigation-2d", **changes: Any) -> TrainConfig:
    """A small run's options, with a constant learning rate: a schedule would tell runs of other lengths apart."""
    return TrainConfig.for_task(task, **{**SMALL, "lr_schedule": "constant", **changes})


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run's iterations."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> Iterator[Event]:
    """TensorBoard's events of a run, file after file."""
    for path in sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)  # then its checksum, the event and the event's checksum
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16


def tags(run: Path) -> dict[str, list[int]]:
    """Steps by tag of everything in TensorBoard's events of a run."""
    found: dict[str, list[int]] = {}
    for event in events(run):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    return found


def steady(run: Path) -> list[dict[str, Any]]:
    """What was logged and does not depend on time and on deaths."""
    volatile = ("seconds", "restarts")
    return [{name: value for name, value in line.items() if name not in volatile} for line in logged(run)]


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Ask again and again; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
