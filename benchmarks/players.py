"""Classical players and meta-learned policies on the same trials: bandits, tabular MDPs, navigation, noisy carts.

python benchmarks/players.py --task bandit
python benchmarks/players.py --task bandit --policies runs/bandit
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from _report import log, report

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.algorithms.statistics import confidence_interval, interval_values
from ssm_metarl.config import TrainConfig
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.evaluation.tasks import SPLIT_BRANCHES
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks import make
from ssm_metarl.tasks.baselines.play import BASELINE_POLICIES, play_baseline


@dataclass(frozen=True)
class Options:
    """Play held-out trials of split test, those of `evaluate` with the same seed.

    Attributes:
        task: family.
        arms: of bandit.
        difficulty: of noisy-position-only-cartpole, easy, medium or hard.
        trial_episodes: episodes of a trial (tabular-mdp).
        num_tasks: trials, each of its own task.
        policies: checkpoints or runs that play_baseline the same trials, without inner steps.
        seed: of tasks and trials.
    """

    task: Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(tuple(BASELINE_POLICIES)))]
    arms: int = 5
    difficulty: str = "easy"
    trial_episodes: int = 1
    num_tasks: int = 2000
    policies: tuple[Path, ...] = field(default_factory=tuple)
    seed: int = 0


def play_held_out(
    player: str, task: str, task_options: Mapping[str, Any], num_tasks: int, trial_episodes: int, seed: int = 0
) -> Array:
    """Return of each trial [num_tasks], the very ones that `evaluate_checkpoint` gives a policy before any step."""
    family = make(task, task_options)
    branch = SPLIT_BRANCHES["test"]
    tasks = family.sample(num_tasks, np.random.default_rng(seed_for(seed, Branch.EVALUATION, branch)), "test")
    seeds = [seed_for(seed, Branch.EVALUATION, branch, 0, number) for number in range(num_tasks)]
    return play_baseline(player, family, tasks, seeds, num_episodes=1, episodes=trial_episodes)[:, 0]


def main(options: Options) -> None:
    own: Mapping[str, Mapping[str, Any]] = {
        "bandit": {"arms": options.arms},
        "noisy-position-only-cartpole": {"difficulty": options.difficulty},
    }
    family_options = own.get(options.task, {})
    rows: dict[str, Any] = {}
    for name in ("uniform", *BASELINE_POLICIES[options.task]):
        start = time.perf_counter()
        trials = (family_options, options.num_tasks, options.trial_episodes, options.seed)
        rows[name] = _row(play_held_out(name, options.task, *trials))
        log(f"{name}: {rows[name]['return']:.2f} ({time.perf_counter() - start:.0f} s)")
    for path in options.policies:
        config = TrainConfig.from_dict(load_checkpoint(resolve_checkpoint(path)).config)
        trained, played = config.family(), make(options.task, family_options)
        trial_episodes = config.experience.trial_episodes
        if (trial_episodes, trained.action_space) != (options.trial_episodes, played.action_space):
            log(f"{path} was trained on other trials: {trial_episodes} episodes, {dict(config.task_options)}")
        found = evaluate_checkpoint(
            path, task_options=family_options, num_tasks=options.num_tasks, steps=0, episodes=1, seed=options.seed
        )
        rows[str(path)] = _row(found.returns[:, 0])
        log(f"{path}: {rows[str(path)]['return']:.2f}")
    report("players", {"task": options.task, "num_tasks": options.num_tasks, "seed": options.seed, "rows": rows})


def _row(returns: Any) -> dict[str, float | None]:
    found = interval_values(*confidence_interval(np.asarray(returns)))
    return {"return": found.pop("value"), **found}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
