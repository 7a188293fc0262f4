"""Meta-train a model that is shipped with the package, evaluate it on held-out tasks and write it with its card.

python benchmarks/pretrain.py --model cartpole

Started again after an interruption, it resumes the run under `--runs`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import tyro
from _report import log, machine, report

from ssm_metarl import pretrained
from ssm_metarl.config import TrainConfig, available_cores
from ssm_metarl.distributed.train import train
from ssm_metarl.evaluation.compare import compare_modes
from ssm_metarl.evaluation.evaluate import evaluate_checkpoint
from ssm_metarl.storage.checkpoint import load_checkpoint, save_checkpoint
from ssm_metarl.storage.run_folder import checkpoints

TASKS = 200
"""Held-out tasks of an evaluation."""


@dataclass(frozen=True)
class Model:
    """A model to ship.

    Attributes:
        task: family.
        about: what it is, and why this one, for its card.
        options: that differ from `TrainConfig.for_task`.
        evaluation: episodes a task and adaptation step of its evaluation.
    """

    task: str
    about: str
    options: dict[str, Any]
    evaluation: int


MODELS = {
    "cartpole": Model(
        task="cartpole",
        about=(
            "Meta-trained by the recommended options, for its return after one gradient step: before it, the policy "
            "tries out pushes and falls; a step on a few episodes finds their direction and balances the pole. A "
            "policy that is meta-trained in context alone (rl2) balances from its first episode on, and leaves nothing "
            "for adaptation to show: that is why this one is shipped."
        ),
        options={"replay_episodes": 128},
        evaluation=10,
    ),
    "navigation-2d": Model(
        task="navigation-2d",
        about=(
            "Meta-trained in context (rl2): its memory finds the goal from the rewards within an episode. Gradient "
            "steps, with which it was not trained, are small and change little; policies that were meta-trained with "
            "them reached less after three steps than this one does before the first."
        ),
        # Wide actions at first and an entropy bonus keep the policy from being sure too early. More iterations reach
        # more inside the training range and less outside of it: docs/lab-notes/navigation-2d.md.
        options={
            "algorithm": "rl2",
            "iterations": 350,
            "inner_lr": 2e-3,
            "initial_std": 1.0,
            "entropy_bonus": 0.01,
            "replay_episodes": 256,
        },
        evaluation=40,
    ),
}


@dataclass(frozen=True)
class Options:
    """Make one of the shipped models.

    Attributes:
        model: which.
        seed: of training.
        runs: parent of the training run's folder.
        out: folder that gets the model's, by default that of the package.
        learner_threads: of the learner.
    """

    model: Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(tuple(MODELS)))]
    seed: int = 0
    runs: Path = Path("runs/pretrained")
    out: Path = field(default_factory=lambda: Path(pretrained.__file__).parent)
    learner_threads: int = field(default_factory=available_cores)


def main(options: Options) -> None:
    model = MODELS[options.model]
    how = {"seed": options.seed, "learner_threads": options.learner_threads}
    config = TrainConfig.for_task(model.task, **{**model.options, **how})
    run = options.runs / f"{options.model}-{options.seed}"
    log(f"training {options.model} in {run}")
    result = train(config, run, resume=bool(checkpoints(run)), on_iteration=_progress)
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
    trained = load_checkpoint(result.checkpoint)
    folder = options.out / options.model
    # What continues the training is three times as large as the policy, and is left out.
    save_checkpoint(folder, replace(trained, optimizer={}))
    evaluation = evaluate_checkpoint(folder, num_tasks=TASKS, steps=3, episodes=model.evaluation)
    modes = compare_modes(
        folder,
        ("none", "standard", "hybrid"),
        num_tasks=TASKS,
        steps=3,
        episodes=model.evaluation,
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    card = {
        "name": options.model,
        "task": model.task,
        "about": model.about,
        "command": f"python benchmarks/pretrain.py --model {options.model} --seed {options.seed}",
        "date": date.today().isoformat(),
        "seed": options.seed,
        "iterations": trained.progress["iteration"],
        "environment_steps": trained.progress["env_steps"],
        "training_seconds": round(max(result.seconds, _seconds(run / "metrics.jsonl")), 1),
        "parameters": sum(array.size for array in trained.policy.values()),
        "policy": trained.spec.to_dict(),
        "config": trained.config,
        "replay_episodes": len(trained.replay) if trained.replay else 0,
        "evaluation": evaluation.summary(),
        "modes": modes.summary(),
        "sha256": manifest["sha256"],
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
        "machine": machine(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    report("pretrain", card)


def _seconds(metrics: Path) -> float:
    """Of all iterations of a run; 0 where nothing was logged."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum(float(json.loads(line)["seconds"]["total"]) for line in lines)


def _progress(metrics: dict[str, Any]) -> None:
    returns = " → ".join(f"{value:.1f}" for value in metrics["return_by_step"])
    log(f"iteration {metrics['iteration']}: {metrics['env_steps']:,} steps, return {returns}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
