"""Test-time adaptation: what its modes are worth, and what a gradient step adds to a policy without memory.

python benchmarks/adaptation.py --show pretrained
python benchmarks/adaptation.py --show modes --task cartpole
python benchmarks/adaptation.py --show shifted
python benchmarks/adaptation.py --show memoryless
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from _report import log, report

from ssm_metarl.algorithms.statistics import confidence_interval, interval_values
from ssm_metarl.config import TrainConfig, available_cores
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.compare import compare_modes
from ssm_metarl.evaluation.config import MODES, EvaluationConfig
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

TASKS = 200
"""Held-out tasks of a comparison."""

EPISODES = (1, 2, 5, 10)
"""Episodes a task and adaptation step in the comparison of modes, which takes three steps."""

HALFCHEETAH: dict[str, Any] = {"iterations": 150, "replay_episodes": 200, "task_options": {"horizon": 100}}
"""What halfcheetah-dir is trained with before its modes are compared, since no such model is shipped."""

MEMORYLESS: dict[str, Any] = {"num_layers": 0, "inputs": "observation", "iterations": 200}


@dataclass(frozen=True)
class Options:
    """Measure adaptation on held-out tasks.

    Attributes:
        show: pretrained: the shipped models by the published protocols; modes: the four modes with 1 to 10 episodes;
            shifted: the shipped models outside their training range; memoryless: cartpole without memory, with and
            without gradient steps.
        task: family whose modes are compared: cartpole, navigation-2d or halfcheetah-dir.
        seeds: of training (memoryless).
        out: folder of runs.
        learner_threads: threads of the learner.
    """

    show: Literal["pretrained", "modes", "shifted", "memoryless"] = "modes"
    task: str = "cartpole"
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/benchmarks/adaptation")
    learner_threads: int = field(default_factory=available_cores)


def show_pretrained() -> dict[str, Any]:
    """Cartpole after adaptation, and navigation by MAML's protocol: 40 episodes a step, three steps."""
    cartpole = compare_modes(
        "pretrained:cartpole",
        ("none", "standard", "hybrid"),
        num_tasks=TASKS,
        steps=3,
        episodes=10,
    )
    navigation = evaluate_checkpoint("pretrained:navigation-2d", num_tasks=TASKS, steps=3, episodes=40)
    return {"cartpole": cartpole.summary(), "navigation-2d": navigation.summary()}


COLUMNS = (
    "mean", "IQM", "gain over `none`", "probability of improvement", "unchanged tasks", "replayed episodes",
    "steps a task",
)  # fmt: skip

GOALS = {"cartpole": {"1 episode, hybrid": 436.4, "2 episodes, hybrid": 469.7, "5 episodes, hybrid": 497.7,
                      "10 episodes, hybrid": 498.9, "2 episodes, standard": 390.0},
         "navigation-2d": {"10 episodes, none": -2.0}}  # fmt: skip
"""Least mean by family and row: what version 0.1 had."""


def show_modes(options: Options) -> dict[str, Any]:
    """The four modes by number of episodes, of one family."""
    task = options.task
    source = f"pretrained:{task}" if task in ("cartpole", "navigation-2d") else _halfcheetah(options)
    # There are two directions: more tasks are more chance alone, and a simulated step is dear.
    tasks = 40 if task == "halfcheetah-dir" else TASKS
    rows = []
    for episodes in EPISODES:
        log(f"{task}: {episodes} episodes a step")
        found = compare_modes(source, MODES, num_tasks=tasks, steps=3, episodes=episodes).summary()
        name = f"{episodes} episode{'s' if episodes > 1 else ''}"
        rows += [{"name": f"{name}, {mode}", "cells": _cells(row)} for mode, row in found["modes"].items()]
    return {
        "title": f"`{task}`: the four modes",
        **_table(rows, GOALS.get(task, {})),
        "notes": [
            f"The same {tasks} held-out tasks with common random numbers, three adaptation steps, judged on 20 fresh "
            'episodes. "Replayed" is the effective number of stored episodes in the first step.'
        ],
    }


def _cells(row: Mapping[str, Any]) -> list[Any]:
    """A mode's figures in the order of `COLUMNS`."""
    replayed = row["effective_replay_episodes"]
    return [
        *({"mean": (cell := row[key])["value"], "ci_low": cell["ci_low"], "ci_high": cell["ci_high"]}
          for key in ("mean", "iqm", "gain")),
        row["probability_of_improvement"],
        row["unchanged_tasks"],
        replayed[0] if replayed else None,
        row["environment_steps_per_task"],
    ]  # fmt: skip


SHIFTED_GOALS = {"navigation-2d, none": -30.0, "navigation-2d, standard": -20.0}
"""Least mean by row, outside the training range."""


def show_shifted() -> dict[str, Any]:
    """The shipped models on tasks outside their training range, which no selection ever saw."""
    rows = []
    for task in ("cartpole", "navigation-2d"):
        log(f"{task}: shifted-test")
        how = EvaluationConfig(split="shifted-test", num_tasks=TASKS, steps=3, episodes=10)
        found = compare_modes(f"pretrained:{task}", ("none", "standard", "hybrid"), config=how).summary()
        rows += [{"name": f"{task}, {mode}", "cells": _cells(row)} for mode, row in found["modes"].items()]
    return {
        "title": "Pretrained models outside the training range",
        **_table(rows, SHIFTED_GOALS),
        "notes": [f"{TASKS} tasks of the split shifted-test, 10 episodes a step, three adaptation steps."],
    }


def _table(rows: list[dict[str, Any]], bounds: Mapping[str, float]) -> dict[str, Any]:
    """Rows with goals for the means of some of them."""
    means = {row["name"]: row["cells"][0] for row in rows}
    goals = [
        {"row": name, "column": COLUMNS[0], "bound": bound, "most": False, **means[name],
         "met": means[name]["mean"] >= bound}
        for name, bound in bounds.items()
    ]  # fmt: skip
    return {"columns": COLUMNS, "rows": rows, "goals": goals, "goals_met": all(goal["met"] for goal in goals)}


def _halfcheetah(options: Options) -> Path:
    config = TrainConfig.for_task("halfcheetah-dir", **HALFCHEETAH, learner_threads=options.learner_threads)
    run = options.out / "halfcheetah-dir"
    if not run.exists() or checkpoints(run)[-1].name != f"checkpoint_{config.experience.iterations:06d}":
        train(config, run, resume=run.exists(), on_iteration=_progress)
    return run


def show_memoryless(options: Options) -> dict[str, Any]:
    """A policy without memory: adapted, at its own step 0, and trained over all tasks without any gradient step."""
    adapted, unadapted = [], []
    for seed in options.seeds:
        common = {**MEMORYLESS, "seed": seed, "learner_threads": options.learner_threads}
        maml = TrainConfig.for_task("cartpole", **common)
        run = options.out / f"memoryless-maml-{seed}"
        steps = _trained(maml, run)
        plain = TrainConfig.for_task(
            "cartpole", **common, algorithm="rl2", inner_steps=0, baseline="linear", lr_schedule="constant",
            meta_batch=maml.experience.meta_batch, episodes=2 * maml.experience.episodes, outer_lr=maml.meta.outer_lr,
            epochs=maml.meta.epochs, minibatches=1, clip=maml.meta.clip,
        )  # fmt: skip
        other = options.out / f"memoryless-plain-{seed}"
        plain_steps = _trained(plain, other, steps)
        log(f"seed {seed}: {steps:,} steps with and {plain_steps:,} without inner steps")
        adapted.append(evaluate_checkpoint(checkpoints(run)[-1], num_tasks=TASKS, steps=3, episodes=10).returns)
        unadapted.append(evaluate_checkpoint(checkpoints(other)[-1], num_tasks=TASKS, steps=0, episodes=10).returns)
    returns, plain_returns = np.array(adapted).mean(0), np.array(unadapted).mean(0)  # [tasks, S+1], [tasks, 1]
    rival = max(returns[:, 0], plain_returns[:, 0], key=lambda values: values.mean())
    gain = interval_values(*confidence_interval(returns[:, 1] - rival))
    return {
        "return_by_step": returns.mean(0).tolist(),
        "without_adaptation": float(plain_returns.mean()),
        "better_of_both": float(rival.mean()),
        "gain": gain,
        "goal": 100.0,
        "goal_met": (gain["value"] or 0.0) >= 100.0 and (gain["ci_low"] or 0.0) > 0,
    }


def _trained(config: TrainConfig, run: Path, steps: int | None = None) -> int:
    """Train unless it was done, and return the environment steps; given `steps`, go on until as many are taken."""
    metrics = run / "metrics.jsonl"
    iterations = config.experience.iterations
    while True:
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        taken = json.loads(metrics.read_text().splitlines()[-1])["env_steps"] if done else 0
        if done >= iterations and (steps is None or taken >= steps):
            return int(taken)
        if done >= iterations:
            iterations = done + max(1, done // 10)
        longer = config.replace(iterations=iterations)
        train(longer, run, resume=bool(done), on_iteration=_progress)


def _progress(metrics: dict[str, Any]) -> None:
    returns = " → ".join(f"{value:.1f}" for value in metrics["return_by_step"])
    log(f"iteration {metrics['iteration']}: {metrics['env_steps']:,} steps, return {returns}")


def main(options: Options) -> None:
    shows = {
        "pretrained": show_pretrained,
        "modes": lambda: show_modes(options),
        "shifted": show_shifted,
        "memoryless": lambda: show_memoryless(options),
    }
    report("adaptation", {"show": options.show, **shows[options.show]()})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
