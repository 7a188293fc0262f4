"""Whether meta-training reaches what the project claims, over several seeds and on held-out tasks.

    python benchmarks/learning.py --target navigation-2d --seeds 0 1 2

Started again after an interruption, it resumes where it stopped: a seed's training from its last checkpoint,
and a seed that is done is read from its line in `--runs`. To measure a seed anew, delete the line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from _report import commit, keep_run, kept_runs, log, report

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import confidence_interval, interval_values
from ssm_metarl.config import TrainConfig, available_cores
from ssm_metarl.distributed.train import train
from ssm_metarl.distributed.trainer import MetaTrainer
from ssm_metarl.evaluation.evaluate import Evaluation, evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

MACHINE = ("num_workers", "learner_threads")
"""Options that change seconds alone."""

RUNS = Path("benchmarks/results/learning-runs.jsonl")
"""Every seed that was trained and evaluated, with the commit that did it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A claim about learning, and how it is checked.

    Trained with each seed and the options below; the last checkpoint within `max_env_steps` is evaluated on
    tasks of the split `test`, equal for all seeds.

    Attributes:
        claim: in words.
        task: the family.
        options: changes to `TrainConfig.for_task`.
        goal: least mean return after `after` inner steps, over tasks and then seeds; None: it is reported alone.
        after: inner steps.
        max_env_steps: of training, support and query together; None: no limit.
        max_seconds: wall time of training a seed; None: no limit.
        max_untrained: greatest mean return of the initial policy, without adaptation; None: no limit.
        min_gain: least lower bound of the 95 % interval, over tasks, of the gain by adaptation: the return
            after `after` steps less the return before; None: no limit.
        each_seed: the goal is one for every seed, not for their mean alone.
        max_deviation: greatest standard deviation, of any seed, of the training return after the last step over the
            last ten iterations; None: no limit.
        no_harm: later steps are not significantly worse than `after`, paired over tasks.
        num_tasks: held-out tasks.
        episodes: episodes, or trials, a held-out task; None: as in training.
        steps: inner steps evaluated and reported.
        on_train: the last checkpoint is evaluated on as many training tasks, too, and that is reported.
    """

    claim: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    goal: float | None = None
    after: int = 1
    max_env_steps: int | None = None
    max_seconds: float | None = None
    max_untrained: float | None = None
    min_gain: float | None = None
    each_seed: bool = False
    max_deviation: float | None = None
    no_harm: bool = False
    num_tasks: int = 200
    episodes: int | None = None
    steps: int = 3
    on_train: bool = False


TARGETS = {
    "default-run": Target(
        claim="The run that is started without any option: steady, and good on every seed.",
        task="navigation-2d",
        goal=-17.0,
        each_seed=True,
        max_deviation=2.0,
    ),
    "navigation-2d": Target(
        claim="The default policy finds the goal after one gradient step.",
        task="navigation-2d",
        options={"iterations": 12, "meta_batch": 20, "episodes": 20, "inner_lr": 0.02, "outer_lr": 2e-3},
        goal=-17.0,
        max_env_steps=1_000_000,
    ),
    "navigation-2d-memoryless": Target(
        claim="Without memory, only the gradient step can tell the policy where the goal is.",
        task="navigation-2d",
        options={
            "num_layers": 0,
            "inputs": "observation",
            "iterations": 31,
            "meta_batch": 20,
            "episodes": 20,
            "inner_lr": 0.5,
            "outer_lr": 3e-3,
            # Without a share for the policy before adaptation, seeds let it drift away from the start, where a step
            # learns no more than to come back.
            "step_weights": [0.2, 0.8],
        },
        goal=-13.0,
        max_env_steps=2_500_000,
        min_gain=15.0,
    ),
    "navigation-2d-memoryless-3": Target(
        claim="Without memory, three gradient steps find the goal.",
        task="navigation-2d",
        options={
            "num_layers": 0,
            "inputs": "observation",
            "iterations": 120,
            "meta_batch": 20,
            "episodes": 20,
            "inner_steps": 3,
            "inner_lr": 0.2,
            "outer_lr": 3e-3,
            "step_weights": [0.1, 0.2, 0.2, 0.5],
        },
        goal=-6.0,
        after=3,
    ),
    "cartpole": Target(
        claim="One gradient step finds out which way a push goes, within five minutes of training.",
        task="cartpole",
        goal=480.0,
        max_seconds=300.0,
        max_untrained=60.0,
        each_seed=True,
        no_harm=True,
    ),
    "halfcheetah-dir": Target(
        claim="A cheetah learns to run either way; steady over seeds, with half the horizon.",
        task="halfcheetah-dir",
        options={"iterations": 60, "task_options": {"horizon": 100}},
        num_tasks=40,
        min_gain=0.0,
        no_harm=True,
    ),
    "navigation-2d-in-context": Target(
        claim="Within one episode, without any gradient step, the policy finds the goal from its rewards.",
        task="navigation-2d",
        options={"algorithm": "rl2"},
        goal=-12.0,
        after=0,
        steps=0,
        max_env_steps=8_000_000,
    ),
    "bandit": Target(
        claim="100 pulls of 5 arms, played in context.",
        task="bandit",
        options={"algorithm": "rl2"},
        goal=76.0,
        after=0,
        steps=0,
        max_seconds=600.0,
        num_tasks=20_000,
        episodes=1,
    ),
    "tabular-mdp": Target(
        claim="Ten episodes in an unknown Markov decision process, played in context.",
        task="tabular-mdp",
        options={"algorithm": "rl2", "trial_episodes": 10},
        goal=145.0,
        after=0,
        steps=0,
        num_tasks=2_000,
        episodes=1,
    ),
    **{
        f"{task}-{difficulty}": Target(
            claim="A memory of the past, as good as the best that POPGym's authors trained.",
            task=task,
            options={"algorithm": "rl2", "task_options": {"difficulty": difficulty}},
            goal=goal,
            after=0,
            steps=0,
            num_tasks=1_000,
            episodes=1,
        )
        # Morad et al. 2023 (arXiv 2303.01859), the best of 13 memories.
        for task, goals in {
            "repeat-previous": {"easy": 1.0, "medium": 0.789, "hard": 0.191},
            "noisy-position-only-cartpole": {"easy": 0.995, "medium": 0.659, "hard": 0.404},
        }.items()
        for difficulty, goal in goals.items()
    },
}


@dataclass(frozen=True)
class Options:
    """Train a target with several seeds and evaluate it on held-out tasks.

    Attributes:
        target: what to show.
        seeds: of training.
        runs: file with a line for each seed that is done.
        out: folder of trainings.
        num_workers: Ray actors that collect rollouts; 0: in process.
        learner_threads: threads of the learner.
    """

    target: Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(tuple(TARGETS)))]
    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = RUNS
    out: Path = Path("runs/benchmarks")
    num_workers: int = 0
    learner_threads: int = field(default_factory=available_cores)


def run_target(
    name: str, target: Target, seeds: Sequence[int], out: Path, runs: Path, num_workers: int, learner_threads: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train and evaluate every seed that has not been done; see `run_seed`.

    Args:
        name: of the folder in `out`; a seed's own in it is named after what changes its result.
        runs: file with a line for each seed that is done.

    Returns:
        The seeds' results, and the configuration that they share.
    """
    log(f"{name}: {target.claim}")
    results: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    for seed in seeds:
        how = {"seed": seed, "num_workers": num_workers, "learner_threads": learner_threads}
        config = TrainConfig.for_task(target.task, **{**target.options, **how})
        protocol = (target.max_env_steps, target.num_tasks, target.steps, target.episodes)
        options = {option: value for option, value in config.to_dict().items() if option not in MACHINE}
        key = json.dumps([options, protocol], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:10]
        job = f"{name}/seed-{seed}-{digest}"
        if (result := kept_runs(runs).get(job)) is not None:
            log(f"seed {seed}: read from {runs}")
        else:
            at = commit()  # of the code that does it
            result = keep_run(runs, job, at, run_seed(target, config, out / job))
        results.append(result)
        shared = {option: value for option, value in config.to_dict().items() if option != "seed"}
    return results, shared


def run_seed(target: Target, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train and evaluate one seed.

    Returns:
        JSON values: `env_steps` and `seconds` of training, `untrained` return, `evaluation` as from
        `Evaluation.summary`, `returns` [tasks, S+1], with `on_train` the evaluation `on_train`, and of every iteration
        of training the `curve`: `env_steps`, `seconds` and `return_by_step`.
    """
    untrained = evaluate_untrained(target, config, folder / "untrained")
    log(f"seed {config.experience.seed}: untrained {untrained:.1f}; training in {folder / 'run'}")
    seconds = train_seed(config, folder / "run")
    checkpoint, env_steps = last_within(folder / "run", target.max_env_steps)
    evaluation = evaluate_seed(target, config, checkpoint, target.steps)
    lines = metrics(folder / "run")
    other = evaluate_seed(target, config, checkpoint, target.steps, "train").summary() if target.on_train else None
    return {
        "seed": config.experience.seed,
        "env_steps": env_steps,
        "seconds": seconds,
        "untrained": untrained,
        # Standard deviation of the training return after the last step over the last ten iterations.
        "deviation": float(np.std([line["return_by_step"][-1] for line in lines[-10:]], ddof=1)),
        "evaluation": evaluation.summary(),
        **({"on_train": other} if other else {}),
        "returns": [brief(task) for task in evaluation.returns.tolist()],
        "curve": [
            {
                "env_steps": line["env_steps"],
                "seconds": round(line["seconds"]["total"], 3),
                "return_by_step": brief(line["return_by_step"]),
            }
            for line in lines
        ],
    }


def brief(values: Sequence[float]) -> list[float]:
    """With six digits, for a file that is kept."""
    return [float(f"{value:.6g}") for value in values]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Of every iteration of training."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluate_untrained(target: Target, config: TrainConfig, checkpoint: Path) -> float:
    """Mean return of the initial policy without adaptation."""
    trainer = MetaTrainer({**config.to_dict(), "num_workers": 0})
    try:
        trainer.save_checkpoint(str(checkpoint))
    finally:
        trainer.stop()
    return float(np.nanmean(evaluate_seed(target, config, checkpoint, 0).returns))


def evaluate_seed(target: Target, config: TrainConfig, checkpoint: Path, steps: int, split: str = "test") -> Evaluation:
    """The same tasks of a split for every seed and target of a family."""
    return evaluate_checkpoint(
        checkpoint,
        split=split,
        num_tasks=target.num_tasks,
        steps=steps,
        episodes=target.episodes,
        num_workers=config.machine.num_workers,
    )


def train_seed(config: TrainConfig, run: Path) -> float:
    """Train to the end, from the last checkpoint where there is one.

    Returns:
        Wall seconds; for a run that was interrupted, those of its iterations alone.

    Raises:
        SystemExit: a signal ended the run early; it can be resumed.
    """

    def progress(metrics: dict[str, Any]) -> None:
        returns = " → ".join(f"{value:.1f}" for value in metrics["return_by_step"])
        log(
            f"seed {config.experience.seed}: iteration {metrics['iteration']}/{config.experience.iterations}, "
            f"{metrics['env_steps']:,} steps, return {returns}, {metrics['seconds']['total']:.1f} s"
        )

    resume = bool(checkpoints(run))
    if not resume:  # interrupted before the first checkpoint
        (run / "metrics.jsonl").unlink(missing_ok=True)
    result = train(config, run, resume=resume, on_iteration=progress)
    if result.signal is not None:
        log(f"seed {config.experience.seed}: interrupted; the same command resumes from {result.checkpoint}")
        raise SystemExit(128 + result.signal)
    return max(result.seconds, sum(line["seconds"]["total"] for line in metrics(run)))


def last_within(run: Path, max_env_steps: int | None) -> tuple[Path, int]:
    """The last checkpoint kept that was trained on `max_env_steps` or fewer, and on how many.

    Raises:
        SystemExit: none of them is.
    """
    for path in reversed(checkpoints(run)):
        env_steps = int(load_checkpoint(path).progress["env_steps"])
        if max_env_steps is None or env_steps <= max_env_steps:
            return path, env_steps
    raise SystemExit(f"All checkpoints kept in {run} took more than {max_env_steps:,} steps: lower `iterations`.")


def mean_interval(samples: Array) -> dict[str, Any]:
    """Mean and 95 % interval of independent samples [n]; bounds are None for a single one."""
    found = interval_values(*confidence_interval(samples))
    return {"mean": found.pop("value"), **found}


def summarise(target: Target, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the seeds showed, and whether it meets the target."""
    returns = np.array([result["returns"] for result in results])  # [seeds, tasks, S+1]
    gains = returns[..., target.after] - returns[..., 0]
    per_seed = np.nanmean(returns, 1)  # [seeds, S+1]
    value = mean_interval(per_seed[:, target.after])
    # Tasks are the same for all seeds: a task's gain is its mean over seeds.
    gain = mean_interval(np.nanmean(gains, 0))
    env_steps = max(result["env_steps"] for result in results)
    seconds = max(result["seconds"] for result in results)
    untrained = float(np.mean([result["untrained"] for result in results]))
    steadiness = max(result["deviation"] for result in results)
    reached = float(per_seed[:, target.after].min()) if target.each_seed else value["mean"]
    # The later step that looks worst: the upper bound of what it adds to `after`.
    later = (np.nanmean(returns[..., target.after + 1 :] - returns[..., [target.after]], 0)).T
    harm = min((mean_interval(tasks)["ci_high"] for tasks in later), default=0.0) if target.no_harm else None
    checks = {
        "return": (reached, ">=", target.goal),
        "env_steps": (env_steps, "<=", target.max_env_steps),
        "seconds": (seconds, "<=", target.max_seconds),
        "untrained": (untrained, "<=", target.max_untrained),
        "gain_ci_low": (gain["ci_low"], ">=", target.min_gain),
        "deviation": (steadiness, "<=", target.max_deviation),
        "later_ci_high": (harm, ">=", 0.0 if target.no_harm else None),
    }
    verdicts = {
        # A claim about an interval is not met where there is none.
        name: measured is not None and (measured >= bound if sign == ">=" else measured <= bound)
        for name, (measured, sign, bound) in checks.items()
        if bound is not None
    }
    return {
        "claim": target.claim,
        "goal": target.goal,
        "value": value["mean"],
        "per_seed": per_seed[:, target.after].tolist(),
        "ci_low": value["ci_low"],
        "ci_high": value["ci_high"],
        "env_steps": env_steps,
        "seconds": seconds,
        "goal_met": all(verdicts.values()),
        "checks": verdicts,
        "limits": {name: bound for name, (_, _, bound) in checks.items() if bound is not None},
        "untrained": untrained,
        "deviation": steadiness,
        "return_by_step": [mean_interval(of_step) for of_step in per_seed.T],
        "gain": gain,
        "seeds": [result["seed"] for result in results],
        "runs": [
            {
                **{key: value for key, value in result.items() if key not in ("job", "returns", "curve")},
                "gain": mean_interval(own),
            }
            for result, own in zip(results, gains, strict=True)
        ],
    }


def main(options: Options) -> None:
    target = TARGETS[options.target]
    results, shared = run_target(
        options.target, target, options.seeds, options.out, options.runs, options.num_workers, options.learner_threads
    )
    report("learning", {"target": options.target, **summarise(target, results), "config": shared})


if __name__ == "__main__":
    main(tyro.cli(Options))
