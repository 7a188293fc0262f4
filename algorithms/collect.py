"""The one rollout loop: vector environment + policy weights + seeds → Rollouts. NumPy only."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from .inference import NumpyPolicy, PolicySpec
from .rollouts import Array, Rollouts

MakeEnv = Callable[[Sequence[Any], int], gymnasium.vector.VectorEnv]


def seed_for(seed: int, *path: int) -> np.random.SeedSequence:
    """The node of the seed tree at ``path``; every random draw of a run comes from such a node.

    Args:
        seed: the run's seed, a non-negative integer.
        path: non-negative integers, such as (domain, iteration, phase, task index).
    """
    return np.random.SeedSequence(seed, spawn_key=path)


def collect(
    env: gymnasium.vector.VectorEnv,
    spec: PolicySpec,
    weights: Mapping[str, Array],
    seeds: Sequence[np.random.SeedSequence],
    tasks: Sequence[Any],
    horizon: int,
    *,
    deterministic: bool = False,
) -> Rollouts:
    """Let the policy act for one episode in every column of ``env``.

    Args:
        env: M·K sub-environments, column k of task m at index m·K + k, autoreset in the same step.
        spec: the policy's sizes.
        weights: float32 arrays, shared by all tasks or with a leading task axis [M, ...] (see ``NumpyPolicy``).
        seeds: one node of the seed tree for each of the M tasks; environment seeds and action noise come from it
            alone.
        tasks: the M tasks' parameters, kept in the record.
        horizon: most steps of an episode; longer episodes are cut.
        deterministic: take the most likely action instead of sampling.

    Returns:
        One record of the M tasks. An episode in which an observation or a reward was not finite is dropped: its
        column has no valid step, and ``errors`` says where it happened.
    """
    num_tasks = len(seeds)
    columns = env.num_envs // num_tasks
    shape = (num_tasks, columns)
    env_seeds: list[int] = []
    noise_parts = []
    for seed in seeds:
        # Children by key, not by spawn(), which counts how often it was called.
        env_node, noise_node = (
            np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, child)) for child in (0, 1)
        )
        env_seeds += env_node.generate_state(columns).tolist()
        generator = np.random.default_rng(noise_node)
        if spec.discrete:
            noise_parts.append(generator.random((horizon, columns), dtype=np.float32))
        else:
            block = (horizon, columns, spec.action_size)
            noise_parts.append(generator.standard_normal(block, dtype=np.float32))
    noise = None if deterministic else np.stack(noise_parts, 1)

    policy = NumpyPolicy(spec, weights)
    state = policy.initial_state(*shape)
    size = spec.observation_size
    inputs = np.zeros((*shape, spec.input_size), np.float32)
    full = spec.inputs == "full"
    if full:
        inputs[..., -1] = 1.0  # start flag
        one_hot = np.eye(spec.action_size, dtype=np.float32)

    observations = np.zeros((horizon, *shape, size), np.float32)
    actions: Array = np.zeros((horizon, *_action_shape(spec, shape)), _action_type(spec))
    rewards, log_probs = np.zeros((2, horizon, *shape), np.float32)
    terminated, valid = np.zeros((2, horizon, *shape), bool)
    last = np.zeros((*shape, size), np.float32)
    alive = np.ones(shape, bool)
    broken: dict[tuple[int, int], str] = {}

    def screen(observation: Array, reward: Array, step: int) -> tuple[Array, Array]:
        """Take columns with a number that is not finite out of the rollout."""
        bad = ~(np.isfinite(observation).all(-1) & np.isfinite(reward))
        for task, column in zip(*np.nonzero(bad & alive), strict=True):
            key = (int(task), int(column))
            broken[key] = f"task {tasks[task]!r}: observation or reward not finite at step {step}."
        alive[bad] = False
        return np.where(bad[..., None], np.float32(0), observation), np.where(bad, np.float32(0), reward)

    # a seed a column, as SyncVectorEnv takes them; the base class declares one integer
    observation = env.reset(seed=env_seeds)[0].reshape(*shape, size)  # type: ignore[arg-type]
    reward = np.zeros(shape, np.float32)
    steps = 0
    if not np.isfinite(observation.sum()):
        observation, reward = screen(observation, reward, 0)
    while steps < horizon and alive.any():
        t = steps
        inputs[..., :size] = observations[t] = observation
        action, log_probs[t], state = policy.act(inputs, state, None if noise is None else noise[t])
        actions[t] = action
        flat_action = action.reshape(num_tasks * columns, *action.shape[2:])
        next_observation, step_reward, ended, cut, info = env.step(flat_action)
        observation = next_observation.reshape(*shape, size)
        reward = np.asarray(step_reward, np.float32).reshape(shape)
        valid[t] = alive
        ended, done = ended.reshape(shape), (ended | cut).reshape(shape)
        final = observation
        if done.any():
            final = _final_observations(observation, info)
        if not (np.isfinite(final.sum()) and np.isfinite(reward.sum())):
            final, reward = screen(final, reward, t + 1)
            observation = np.where(np.isfinite(observation), observation, np.float32(0))
        rewards[t] = reward
        terminated[t] = ended & alive
        finishing = alive & done
        if t + 1 == horizon:
            finishing = alive
        if finishing.any():
            last[finishing] = final[finishing]
        alive = alive & ~done
        steps += 1
        if full:
            inputs[..., size:-2] = one_hot[action] if spec.discrete else action
            inputs[..., -2] = reward
            inputs[..., -1] = 0.0

    for key in broken:
        valid[:, key[0], key[1]] = False
    longest = max(1, int(valid.any((1, 2)).sum()))

    def by_task(array: Array) -> Array:
        array = np.moveaxis(array[:longest], 0, 1)
        mask = valid[:longest].swapaxes(0, 1)
        kept = np.where(mask[..., None] if array.ndim == 4 else mask, array, np.zeros((), array.dtype))
        return np.ascontiguousarray(kept)  # the order in memory decides the last bits of a later sum

    starts = np.zeros((*shape[:1], longest, columns), bool)
    starts[:, 0] = True
    return Rollouts(
        observations=by_task(observations),
        actions=by_task(actions),
        rewards=by_task(rewards),
        log_probs=by_task(log_probs),
        starts=starts,
        resets=starts.copy(),
        terminated=by_task(terminated),
        valid=np.ascontiguousarray(valid[:longest].swapaxes(0, 1)),
        last_observations=np.where(np.logical_or.reduce(valid, 0)[..., None], last, np.float32(0)),
        tasks=tuple(tasks),
        errors=tuple(broken[key] for key in sorted(broken)),
    )


def collect_tasks(
    make_env: MakeEnv,
    spec: PolicySpec,
    weights: Mapping[str, Array],
    seeds: Sequence[np.random.SeedSequence],
    tasks: Sequence[Any],
    columns: int,
    horizon: int,
    *,
    deterministic: bool = False,
) -> Rollouts:
    """Make the tasks' environments and :func:`collect`; a task whose environment raises is dropped, the others are
    not.

    Since a task's experience depends on its seed alone, collecting again task by task after an exception returns for
    the healthy tasks exactly what would have been collected with all of them together.

    Args:
        make_env: ``TaskDistribution.make_vector_env``.
        columns: episodes K a task.

    Returns:
        One record of the M tasks; ``errors`` holds the traceback of each environment that raised, once an episode
        lost.
    """

    def attempt(part: slice) -> Rollouts:
        env = make_env(tasks[part], columns)
        try:
            shared = weights["encoder.weight"].ndim == 2
            own = weights if shared else {name: value[part] for name, value in weights.items()}
            return collect(env, spec, own, seeds[part], tasks[part], horizon, deterministic=deterministic)
        finally:
            env.close()

    try:
        return attempt(slice(0, len(tasks)))
    except Exception:
        parts: list[Rollouts] = []
        for i in range(len(tasks)):
            try:
                parts.append(attempt(slice(i, i + 1)))
            except Exception:
                blank = _blank(spec, tasks[i], columns)
                parts.append(Rollouts.empty([tasks[i]], columns, blank, [traceback.format_exc()] * columns))
        return Rollouts.concatenate(parts)


def _action_type(spec: PolicySpec) -> type:
    return np.int64 if spec.discrete else np.float32


def _action_shape(spec: PolicySpec, columns: tuple[int, ...]) -> tuple[int, ...]:
    return columns if spec.discrete else (*columns, spec.action_size)


def _final_observations(observation: Array, info: Mapping[str, Any]) -> Array:
    """Observations before the autoreset: ``final_obs`` where an episode ended, else the current ones."""
    final = observation.copy()
    flat = final.reshape(-1, final.shape[-1])
    for index in np.flatnonzero(info["_final_obs"]):
        flat[index] = info["final_obs"][index]
    return final


def _blank(spec: PolicySpec, task: Any, columns: int) -> Rollouts:
    """A record of one task and no step, for tasks of which nothing is known but the policy's sizes."""
    mask = np.zeros((1, 1, columns), bool)
    number = np.zeros((1, 1, columns), np.float32)
    vectors = np.zeros((1, 1, columns, spec.observation_size), np.float32)
    actions: Array = np.zeros((1, *_action_shape(spec, (1, columns))), _action_type(spec))
    return Rollouts(vectors, actions, number, number, mask, mask, mask, mask, vectors[:, 0], (task,))
