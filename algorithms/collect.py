"""The one rollout loop: vector environment + policy weights + seeds → Rollouts. NumPy only."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from ssm_metarl.algorithms.numpy_policy import NumpyPolicy
from ssm_metarl.algorithms.parameters import of_tasks
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.core import SUCCESS, InvalidStep, TaskDistribution
from ssm_metarl.seeds import child

MakeEnv = Callable[[Sequence[Any], int], gymnasium.vector.VectorEnv]

Steps = Generator[None, None, Rollouts]
"""A rollout under way: it pauses after every step, and returns the record."""

_log = logging.getLogger(__name__)


def collect(
    env: gymnasium.vector.VectorEnv,
    spec: PolicySpec,
    weights: Mapping[str, Array],
    seeds: Sequence[np.random.SeedSequence],
    tasks: Sequence[Any],
    horizon: int,
    *,
    trial_episodes: int = 1,
    deterministic: bool = False,
) -> Steps:
    """Let the policy act for one episode, or one trial of several, in every slot of `env`; see `played`.

    Args:
        env: M·K sub-environments, slot k of task m at index m·K + k, autoreset in the same step.
        spec: the policy's sizes.
        weights: float32 arrays, shared by all tasks or with a leading task axis [M, ...] (see `NumpyPolicy`).
        seeds: one node of the seed tree for each of the M tasks; environment seeds and action noise come from it
            alone.
        tasks: the M tasks' parameters, kept in the record.
        horizon: most steps of an episode; a trial of `trial_episodes` times as many is cut.
        trial_episodes: episodes that follow each other in a slot, with the recurrent state, the previous action and the
            previous reward carried over (Duan et al. 2016, arXiv 1611.02779); `env` must end them itself.
        deterministic: take the most likely action instead of sampling.

    Returns:
        One record of the M tasks, after a pause (yield) at every step. An episode in which an observation, a reward, an
        action or its log-probability was not finite is dropped: its slot has no valid step, and `errors` says where it
        happened. An episode succeeds where the infos of a step have a number above 0 as "success" or "is_success", as
        those of Meta-World and of Gymnasium-Robotics.
    """
    shape = (len(seeds), env.num_envs // len(seeds))
    horizon *= trial_episodes
    env_seeds, noise = _draw(seeds, spec, horizon, shape[1])
    policy = NumpyPolicy(spec, weights)
    state = policy.initial_state(*shape)
    record = _Record(spec, tasks, shape, horizon, trial_episodes)
    size = spec.observation_size
    inputs = np.zeros((*shape, spec.input_size), np.float32)
    full = spec.inputs == "full"
    if full:
        inputs[..., -1] = 1.0  # start flag
    # a seed an episode slot, as SyncVectorEnv takes them; the base class declares one integer
    observation = env.reset(seed=env_seeds)[0].reshape(*shape, size)  # type: ignore[arg-type]
    observation, reward = record.screen(observation, np.zeros(shape, np.float32), 0)
    steps = 0
    while steps < horizon and record.alive.any():
        inputs[..., :size] = observation
        action, log_prob, state = policy.act(inputs, state, None if deterministic else noise[steps])
        action, log_prob = record.screen_policy(action, log_prob, steps)
        record.before(steps, observation, action, log_prob)
        moves = spec.env_actions(action).reshape(env.num_envs, *action.shape[2:])
        observation, step_reward, ended, cut, info = env.step(moves)
        observation = observation.reshape(*shape, size)
        reward = np.asarray(step_reward, np.float32).reshape(shape)
        ended, done = ended.reshape(shape), (ended | cut).reshape(shape)
        final = _final_observations(observation, info) if done.any() else observation
        screened, reward = record.screen(final, reward, steps + 1)
        if final is not observation and trial_episodes > 1:  # what the next episode begins with counts, too
            observation, reward = record.screen(observation, reward, steps + 1)
        if screened is not final:
            observation = np.where(np.isfinite(observation), observation, np.float32(0))
        record.after(steps, screened, reward, ended, done, _successes(info, done) if info else None)
        steps += 1
        if full:
            inputs[..., size:-2] = spec.encoded(action)
            inputs[..., -2] = reward
            inputs[..., -1] = done
        yield
    return record.rollouts()


def collect_tasks(
    make_env: MakeEnv,
    spec: PolicySpec,
    weights: Mapping[str, Array],
    seeds: Sequence[np.random.SeedSequence],
    tasks: Sequence[Any],
    num_episodes: int,
    horizon: int,
    *,
    trial_episodes: int = 1,
    deterministic: bool = False,
) -> Steps:
    """Make the tasks' environments and `collect`; a task whose environment raises is dropped, the others are not.

    Since a task's experience depends on its seed alone, collecting again task by task after an exception returns for
    the healthy tasks exactly what would have been collected with all of them together.

    Args:
        make_env: `TaskDistribution.make_vector_env`.
        num_episodes: episodes, or trials, K a task.

    Returns:
        One record of the M tasks; `errors` holds the `failure` of each environment that raised, once an episode lost.
    """

    def attempt(part: slice) -> Steps:
        env = make_env(tasks[part], num_episodes)
        try:
            return (yield from collect(
                env, spec, of_tasks(weights, part), seeds[part], tasks[part], horizon,
                trial_episodes=trial_episodes, deterministic=deterministic,
            ))  # fmt: skip
        finally:
            _close(env)

    try:
        return (yield from attempt(slice(0, len(tasks))))
    except (Exception, SystemExit) as error:
        _unless_signalled(error)
    parts: list[Rollouts] = []
    for i in range(len(tasks)):
        try:
            parts.append((yield from attempt(slice(i, i + 1))))
        except (Exception, SystemExit) as error:
            _unless_signalled(error)
            parts.append(blank(spec, tasks[i : i + 1], num_episodes, [failure(error, tasks[i])] * num_episodes))
    return Rollouts.concatenate(parts)


def collect_family(
    family: TaskDistribution,
    spec: PolicySpec,
    weights: Mapping[str, Array],
    seeds: Sequence[np.random.SeedSequence],
    tasks: Sequence[Any],
    num_episodes: int,
    trial_episodes: int,
    deterministic: bool,
) -> Steps:
    """`collect_tasks` with a family's environments and horizon."""
    return collect_tasks(
        family.make_vector_env, spec, weights, seeds, tasks, num_episodes, family.horizon,
        trial_episodes=trial_episodes, deterministic=deterministic,
    )  # fmt: skip


def played(steps: Steps) -> Rollouts:
    """Play a rollout to its end; its record."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            record: Rollouts = end.value
            return record


def failure(error: BaseException, task: Any) -> str:
    """How an exception of an environment is told: its traceback, or a sentence where that says all."""
    if isinstance(error, InvalidStep):
        return f"task {task!r}: {error}"
    if isinstance(error, SystemExit):
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.name}, line {place.lineno} of {place.filename}"
        return f"task {task!r}: the environment exits with {error.code!r} in {where}, which would end the process."
    return "".join(traceback.format_exception(error))


def _close(env: gymnasium.vector.VectorEnv) -> None:
    """Close an environment; one that cannot be is no reason to lose what it has played."""
    try:
        env.close()
    except (Exception, SystemExit) as error:
        _unless_signalled(error)
        _log.warning("An environment could not be closed: %s: %s", type(error).__name__, error)


def _unless_signalled(error: BaseException) -> None:
    """Raise again the SystemExit of a signal's handler: it ends the process, that of an environment does not."""
    if not isinstance(error, SystemExit):
        return
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    if any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error


def _draw(
    seeds: Sequence[np.random.SeedSequence], spec: PolicySpec, horizon: int, num_episodes: int
) -> tuple[list[int], Array]:
    """Every draw of a rollout, task by task: a seed for each environment, and the action noise [T, M, K, ...]."""
    env_seeds: list[int] = []
    noise = []
    for seed in seeds:
        env_node, noise_node = child(seed, 0), child(seed, 1)
        env_seeds += env_node.generate_state(num_episodes).tolist()
        generator = np.random.default_rng(noise_node)
        noise.append(spec.draw_noise(generator, horizon, num_episodes))
    return env_seeds, np.stack(noise, 1)


class _Record:
    """What `collect` has seen so far: arrays [T, M, K, ...] that it fills, and the episode slots still `alive`."""

    def __init__(
        self, spec: PolicySpec, tasks: Sequence[Any], shape: tuple[int, int], horizon: int, episodes: int
    ) -> None:
        self._tasks = tasks
        self._left = np.full(shape, episodes)  # episodes of the trial that have not ended
        self._observations = np.zeros((horizon, *shape, spec.observation_size), np.float32)
        self._actions: Array = np.zeros((horizon, *shape, *spec.action_shape), spec.action_type)
        self._rewards, self._log_probs = np.zeros((2, horizon, *shape), np.float32)
        self._terminated, self._valid, self._starts = np.zeros((3, horizon, *shape), bool)
        self._starts[0] = True
        self._last = np.zeros((*shape, spec.observation_size), np.float32)
        self._episodes = episodes
        self._successes: Array | None = None
        self._broken: dict[tuple[int, int], str] = {}
        self.alive = np.ones(shape, bool)

    def screen(self, observation: Array, reward: Array, step: int) -> tuple[Array, Array]:
        """Take episode slots with a number that is not finite out of the rollout; return the arrays with 0 there."""
        if np.isfinite(observation.sum()) and np.isfinite(reward.sum()):
            return observation, reward
        bad = ~(np.isfinite(observation).all(-1) & np.isfinite(reward))
        self._take_out(bad, "observation or reward", step)
        return np.where(bad[..., None], np.float32(0), observation), np.where(bad, np.float32(0), reward)

    def screen_policy(self, action: Array, log_prob: Array, step: int) -> tuple[Array, Array]:
        """The same for what a policy does. A discrete action is a number even where the logits are none."""
        if np.isfinite(log_prob.sum()) and np.isfinite(action.sum()):
            return action, log_prob
        numbers = np.isfinite(action) if action.ndim == log_prob.ndim else np.isfinite(action).all(-1)
        bad = ~(np.isfinite(log_prob) & numbers)
        self._take_out(bad, "the policy's action", step)
        zeros = bad if action.ndim == bad.ndim else bad[..., None]
        return np.where(zeros, np.zeros((), action.dtype), action), np.where(bad, np.float32(0), log_prob)

    def _take_out(self, bad: Array, what: str, step: int) -> None:
        for task, slot in zip(*np.nonzero(bad & self.alive), strict=True):
            self._broken[int(task), int(slot)] = f"task {self._tasks[task]!r}: {what} not finite at step {step}."
        self.alive = self.alive & ~bad

    def before(self, t: int, observation: Array, action: Array, log_prob: Array) -> None:
        """Record the policy's side of step t."""
        self._observations[t] = observation
        self._actions[t] = action
        self._log_probs[t] = log_prob
        self._valid[t] = self.alive

    def after(
        self, t: int, final: Array, reward: Array, ended: Array, done: Array, successes: Array | None = None
    ) -> None:
        """Record the environment's side of step t: what it observed before any autoreset, reward, ends and success."""
        self._rewards[t] = reward
        if successes is not None:
            if self._successes is None:
                self._successes = np.zeros((*self.alive.shape, self._episodes), bool)
            task, slot = np.nonzero(successes & self.alive)
            self._successes[task, slot, self._episodes - self._left[task, slot]] = True
        self._left -= done
        over = done & (self._left <= 0)
        self._terminated[t] = ended & over & self.alive
        finishing = self.alive if t + 1 == len(self._valid) else self.alive & over
        if finishing.any():
            self._last[finishing] = final[finishing]
        self.alive = self.alive & ~over
        if t + 1 < len(self._valid):
            self._starts[t + 1] = done & self.alive

    def rollouts(self) -> Rollouts:
        """The record by task, without the steps that no slot took."""
        valid = self._valid
        for task, slot in self._broken:
            valid[:, task, slot] = False
        longest = max(1, int(valid.any((1, 2)).sum()))
        mask = np.ascontiguousarray(valid[:longest].swapaxes(0, 1))

        def by_task(array: Array) -> Array:
            array = np.moveaxis(array[:longest], 0, 1)
            kept = np.where(mask[..., None] if array.ndim == 4 else mask, array, np.zeros((), array.dtype))
            return np.ascontiguousarray(kept)  # the order in memory decides the last bits of a later sum

        resets = np.zeros(mask.shape, bool)
        resets[:, 0] = True
        starts = np.ascontiguousarray(self._starts[:longest].swapaxes(0, 1))
        return Rollouts(
            observations=by_task(self._observations),
            actions=by_task(self._actions),
            rewards=by_task(self._rewards),
            log_probs=by_task(self._log_probs),
            starts=starts,
            resets=resets,
            terminated=by_task(self._terminated),
            valid=mask,
            last_observations=np.where(np.logical_or.reduce(valid, 0)[..., None], self._last, np.float32(0)),
            tasks=tuple(self._tasks),
            errors=tuple(self._broken[key] for key in sorted(self._broken)),
            successes=self._successes,
        )


def _final_observations(observation: Array, info: Mapping[str, Any]) -> Array:
    """Observations before the autoreset: `final_obs` where an episode ended, else the current ones."""
    final = observation.copy()
    flat = final.reshape(-1, final.shape[-1])
    for index in np.flatnonzero(info["_final_obs"]):
        flat[index] = info["final_obs"][index]
    return final


def _successes(info: Mapping[str, Any], done: Array) -> Array | None:
    """Which episodes the environment calls successful at a step, [M, K] bool; None: it says nothing of it.

    Where an episode ended, the infos are those of the next one's start, and `final_info` has its own.
    """
    found = None
    for told, meant in ((info, ~done), (info.get("final_info", {}), done)):
        for name in SUCCESS:
            values = np.asarray(told.get(name, ""))
            if values.dtype.kind in "biuf" and values.size == done.size:
                said = np.asarray(told.get(f"_{name}", True)).ravel() & (values.ravel() > 0)
                found = (np.zeros(done.shape, bool) if found is None else found) | (said.reshape(done.shape) & meant)
    return found


def blank(spec: PolicySpec, tasks: Sequence[Any], num_episodes: int, errors: Sequence[str] = ()) -> Rollouts:
    """A record of tasks without a single valid step: what stands for dropped ones."""
    shape = (len(tasks), 1, num_episodes)
    rewards, log_probs = np.zeros((2, *shape), np.float32)
    observations = np.zeros((*shape, spec.observation_size), np.float32)
    actions: Array = np.zeros((*shape, *spec.action_shape), spec.action_type)
    starts, resets, terminated, valid = np.zeros((4, *shape), bool)
    last = np.zeros_like(observations[:, 0])
    arrays = (observations, actions, rewards, log_probs, starts, resets, terminated, valid, last)
    return Rollouts(*arrays, tuple(tasks), tuple(errors))
