"""`rl2` beside sb3-contrib's RecurrentPPO on the same family: environment steps, seconds and return.

    pip install sb3-contrib
    python benchmarks/peers.py --task cartpole --target 480

Both play trials of one episode, read the same inputs (observation, previous action, previous reward, start flag), and
have one thread each. RecurrentPPO has the defaults of its package with 16 environments, and a second row a batch and
a learning rate as large as `rl2`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from _report import log, report
from sb3_contrib import RecurrentPPO  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.callbacks import BaseCallback  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.vec_env import DummyVecEnv  # pyright: ignore[reportMissingImports]

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.rllib.env import TaskEnv
from ssm_metarl.distributed.trainer import MetaTrainer

NUM_ENVS = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train both until the target, or for as many environment steps.

    Attributes:
        task: family.
        target: mean return at which the seconds are taken.
        steps: most environment steps.
        seconds: most seconds of a training.
        seeds: trainings of each.
    """

    task: str = "cartpole"
    target: float = 480.0
    steps: float = 3e6
    seconds: float = 900.0
    seeds: tuple[int, ...] = (0, 1, 2)


class Trial(gymnasium.Env[Array, Any]):
    """One episode slot of `TaskEnv`, whose resets begin a new task."""

    def __init__(self, config: TrainConfig, seed: int) -> None:
        family = config.family()
        self._env = TaskEnv({"distribution": family, "spec": config.policy_spec(family), "num_envs": 1})
        self._begun, self._first = False, seed
        self.observation_space = self._env.single_observation_space
        self.action_space = self._env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a trial."""
        if self._begun:  # the step after the last one begins the next trial
            return self._env.step(self._env.action_space.sample())[0][0], {}
        self._begun = True
        return self._env.reset(seed=self._first)[0][0], {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move one step."""
        inputs, rewards, terminated, truncated, infos = self._env.step(np.asarray(action)[None])
        done = bool(terminated[0] or truncated[0])
        said = {"episode": {"r": float(infos["return"][0]), "l": int(infos["length"][0])}} if done else {}
        return inputs[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), said


class Watch(BaseCallback):
    """The curve of mean returns of the last hundred trials, and the end of the training."""

    def __init__(self, options: Options, begin: float) -> None:
        super().__init__()
        self.options, self.begin = options, begin
        self.returns: list[float] = []
        self.curve: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return time.perf_counter() - self.begin < self.options.seconds

    def _on_rollout_end(self) -> None:
        if self.returns:
            self.curve.append(point(self.num_timesteps, self.begin, float(np.mean(self.returns[-100:]))))


def point(env_steps: int, begin: float, value: float) -> dict[str, float]:
    """Of a curve."""
    return {"env_steps": env_steps, "seconds": round(time.perf_counter() - begin, 1), "return": round(value, 2)}


def recurrent_ppo(options: Options, seed: int, **settings: Any) -> list[dict[str, float]]:
    """sb3-contrib's RecurrentPPO."""
    config = TrainConfig.for_task(options.task, algorithm="rl2")

    def slot(number: int) -> Callable[[], Trial]:
        return lambda: Trial(config, 1000 * seed + number)

    begin = time.perf_counter()
    envs = DummyVecEnv([slot(i) for i in range(NUM_ENVS)])
    model = RecurrentPPO("MlpLstmPolicy", envs, seed=seed, device="cpu", **settings)
    watch = Watch(options, begin)
    model.learn(int(options.steps), callback=watch)
    return watch.curve


def ours(options: Options, seed: int) -> list[dict[str, float]]:
    """This project's `rl2` with its recommended options."""
    begin, curve = time.perf_counter(), list[dict[str, float]]()
    options_of = {"algorithm": "rl2", "seed": seed, "num_workers": 0, "learner_threads": 1}
    trainer = MetaTrainer.of_run(TrainConfig.for_task(options.task, **options_of))
    while trainer.meta_iteration < trainer.train_config.experience.iterations:
        metrics = trainer.step()
        curve.append(point(trainer.env_steps, begin, metrics["return_after"]))
        if trainer.env_steps >= options.steps or curve[-1]["seconds"] >= options.seconds:
            break
    trainer.cleanup()
    return curve


def main(options: Options) -> None:
    torch.set_num_threads(1)
    large: Mapping[str, Any] = {"n_steps": 512, "batch_size": 1024, "learning_rate": 1e-3, "gamma": 0.99}
    methods: Mapping[str, Callable[[int], list[dict[str, float]]]] = {
        "ours, `rl2`": lambda seed: ours(options, seed),
        "RecurrentPPO": lambda seed: recurrent_ppo(options, seed),
        "RecurrentPPO, large batch": lambda seed: recurrent_ppo(options, seed, **large),
    }
    rows, curves = [], {}
    for name, method in methods.items():
        found = []
        for seed in options.seeds:
            curve = method(seed)
            curves[f"{name}, seed {seed}"] = curve
            reached = next((each for each in curve if each["return"] >= options.target), None)
            found.append(reached)
            log(f"{name}, seed {seed}: {reached or 'not reached'}, last {curve[-1]}")
        rows.append(
            {
                "name": name,
                "seconds": [each and each["seconds"] for each in found],
                "env_steps": [each and each["env_steps"] for each in found],
                "last": [curves[f"{name}, seed {seed}"][-1] for seed in options.seeds],
            }
        )
    report("peers", {"task": options.task, "target": options.target, "rows": rows, "curves": curves})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
