"""RLlib's PPO with its own LSTM, RLlib's PPO with our SSM, and our `rl2`: return against steps and seconds.

    python benchmarks/rllib.py --seeds 0 1 2

The three see the same inputs (observation, previous action, previous reward, start flag) of the same tasks' family, and
have PPO's same constants. What is reported is the return of sampled actions on held-out tasks, the same for all,
whenever another `every` environment steps are done. Seconds are those of training, from before RLlib or the trainer
starts; evaluations do not count.

Started again after an interruption, it goes on with the next job: one that is done is read from its `result.json`
under `--out`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _report import log, report
from learning import mean_interval
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.cluster import start_ray
from ssm_metarl.distributed.pool import Pool
from ssm_metarl.distributed.rllib.ppo import build, ppo_config
from ssm_metarl.distributed.rllib.trainer import PolicyGradientTrainer
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import evaluate_policy
from ssm_metarl.evaluation.tasks import SPLIT_BRANCHES
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution

Step = Callable[[], int]
"""Trains one iteration; returns the environment steps of all so far."""

Evaluate = Callable[[], float]
"""Mean return on the held-out tasks."""


@dataclass(frozen=True)
class Options:
    """Train each with several seeds, and evaluate it on held-out tasks on the way.

    Attributes:
        seeds: of training.
        env_steps: of a run, at least.
        every: environment steps between evaluations.
        task: family.
        num_tasks: held-out tasks, one episode each.
        num_workers: processes that collect, RLlib's or ours; 0: in process.
        learner_threads: threads of the learner.
        out: folder of results.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    env_steps: int = 500_000
    every: int = 50_000
    task: str = "cartpole"
    num_tasks: int = 200
    num_workers: int = 0
    learner_threads: int = 1
    out: Path = Path("runs/benchmarks/rllib")

    def config(self, seed: int) -> TrainConfig:
        """The constants of PPO and the sizes of the policy, for all three."""
        return TrainConfig.for_task(
            self.task, algorithm="policy-gradient", lr_schedule="constant", seed=seed,
            num_workers=self.num_workers, learner_threads=self.learner_threads,
        )  # fmt: skip


# --- The three --------------------------------------------------------------------------------------------


@contextmanager
def rllib_lstm(config: TrainConfig, num_tasks: int) -> Iterator[tuple[Step, Evaluate]]:
    """RLlib's default recurrent model: one tanh layer and an LSTM, as wide as our policy, with a shared critic."""
    family = config.family()
    rllib = ppo_config(config, family)
    rllib.rl_module(
        model_config=DefaultModelConfig(
            fcnet_hiddens=[config.policy.hidden_dim],
            use_lstm=True,
            lstm_cell_size=config.policy.hidden_dim,
            max_seq_len=family.horizon + 1,
            vf_share_layers=True,
        )
    )
    ppo = build(rllib, config.machine.learner_threads)

    def step() -> int:
        return int(ppo.train()[ENV_RUNNER_RESULTS][NUM_ENV_STEPS_SAMPLED_LIFETIME])

    def evaluate() -> float:
        module = ppo.learner_group._learner.module[DEFAULT_MODULE_ID].unwrapped()
        return play(module, family, config.policy_spec(family), num_tasks)

    try:
        yield step, evaluate
    finally:
        ppo.stop()


@contextmanager
def rllib_ssm(config: TrainConfig, num_tasks: int) -> Iterator[tuple[Step, Evaluate]]:
    """RLlib with our policy: the algorithm `policy-gradient`."""
    trainer = PolicyGradientTrainer(config)

    def evaluate() -> float:
        policy = SSMPolicy(trainer.spec)
        policy.load_state_dict({name: torch.from_numpy(value) for name, value in trainer.weights().items()})
        return judge(policy, config, trainer.distribution, num_tasks)

    try:
        yield lambda: int(trainer.step()["env_steps"]), evaluate
    finally:
        trainer.stop()


@contextmanager
def rl2(config: TrainConfig, num_tasks: int) -> Iterator[tuple[Step, Evaluate]]:
    """Our trainer and workers with the same policy; 100 episodes an iteration, each of them whole."""
    config = config.replace(algorithm="rl2", episodes=5)
    trainer = MetaTrainer(config.to_dict())

    def evaluate() -> float:
        return judge(trainer.learner.policy, config, trainer.distribution, num_tasks)

    try:
        yield lambda: int(trainer.step()["env_steps"]), evaluate
    finally:
        trainer.stop()


CONTENDERS = {"rllib-lstm": rllib_lstm, "rllib-ssm": rllib_ssm, "rl2": rl2}


# --- Their returns ----------------------------------------------------------------------------------------


def judge(policy: SSMPolicy, config: TrainConfig, family: TaskDistribution, num_tasks: int) -> float:
    """Mean return of our policy on the held-out tasks, by the evaluator that all commands use."""
    with Pool(family, policy.spec, num_workers=0, name="benchmark") as pool:
        found = evaluate_policy(
            policy, config, family, pool, split="test", num_tasks=num_tasks, steps=0, episodes=1, seed=0
        )
    return float(np.nanmean(found.returns))


@torch.no_grad()
def play(module: TorchRLModule, family: TaskDistribution, spec: PolicySpec, num_tasks: int) -> float:
    """Mean return of a recurrent module of RLlib's on the same tasks; sampled discrete actions."""
    root = seed_for(0, Branch.EVALUATION, SPLIT_BRANCHES["test"])
    tasks = family.sample(num_tasks, np.random.default_rng(root), "test")
    rng = np.random.default_rng(root.spawn(1)[0])
    env = family.make_vector_env(tasks, 1)
    observation = env.reset(seed=rng.integers(2**31, size=num_tasks).tolist())[0]
    size, identity = spec.observation_size, np.eye(spec.action_size, dtype=np.float32)
    inputs = np.zeros((num_tasks, spec.input_size), np.float32)
    inputs[:, -1] = 1.0
    initial = {name: torch.as_tensor(value) for name, value in module.get_initial_state().items()}
    state = {name: value.expand(num_tasks, *value.shape) for name, value in initial.items()}
    returns, alive = np.zeros(num_tasks), np.ones(num_tasks, bool)
    for _ in range(family.horizon):
        inputs[:, :size] = observation
        found = module.forward_exploration({Columns.OBS: torch.from_numpy(inputs)[:, None], Columns.STATE_IN: state})
        state = found[Columns.STATE_OUT]
        logits = found[Columns.ACTION_DIST_INPUTS][:, 0].numpy()
        actions = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
        observation, rewards, terminated, truncated, _ = env.step(actions)
        returns += np.where(alive, rewards, 0.0)
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
        inputs[:, size:-2], inputs[:, -2], inputs[:, -1] = identity[actions], rewards, 0.0
    env.close()
    return float(returns.mean())


# --- Jobs -------------------------------------------------------------------------------------------------


def run_job(name: str, options: Options, seed: int) -> dict[str, Any]:
    """Train one contender with one seed, or read its result where that has been done.

    Returns:
        `curve`: at each evaluation `env_steps`, `seconds` of training so far and `return`.
    """
    config = options.config(seed)
    key = json.dumps([config.to_dict(), options.env_steps, options.every, options.num_tasks], sort_keys=True)
    folder = options.out / f"{name}-seed-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    done = folder / "result.json"
    if done.exists():
        log(f"{name}, seed {seed}: read from {done}")
        return json.loads(done.read_text())
    begin, evaluating, env_steps = time.perf_counter(), 0.0, 0
    curve: list[dict[str, float]] = []
    with CONTENDERS[name](config, options.num_tasks) as (step, evaluate):
        while env_steps < options.env_steps:
            env_steps = step()
            if env_steps // options.every <= len(curve) - 1 and env_steps < options.env_steps:
                continue
            start = time.perf_counter()
            value = evaluate()
            curve.append({"env_steps": env_steps, "seconds": start - begin - evaluating, "return": value})
            evaluating += time.perf_counter() - start
            log(f"{name}, seed {seed}: {env_steps:,} steps, {curve[-1]['seconds']:.0f} s, return {value:.1f}")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = done.with_suffix(".tmp")
    fresh.write_text(json.dumps({"name": name, "seed": seed, "curve": curve}))
    fresh.replace(done)
    return json.loads(done.read_text())


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The end of each contender's runs, over seeds, and the evaluations by number."""
    last = [result["curve"][-1] for result in results]
    rows = zip(*(result["curve"] for result in results))  # as far as the shortest goes
    return {
        **{
            name: mean_interval(np.array([point[name] for point in last]))
            for name in ("return", "env_steps", "seconds")
        },
        "curve": [{key: float(np.mean([point[key] for point in row])) for key in row[0]} for row in rows],
    }


def main(options: Options) -> None:
    start_ray(options.num_workers, always=True)
    # Seed by seed, so that all have met the same disturbances when it is interrupted.
    jobs = [(name, run_job(name, options, seed)) for seed in options.seeds for name in CONTENDERS]
    table = {name: summarise([result for other, result in jobs if other == name]) for name in CONTENDERS}
    shared = {**asdict(options), "out": str(options.out)}
    report("rllib", {"options": shared, "contenders": table, "runs": [result for _, result in jobs]})


if __name__ == "__main__":
    main(tyro.cli(Options))
