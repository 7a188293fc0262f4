"""Self-improvement in a Tuner of one's own, with Tune's results and callbacks around it.

python examples/tune.py
"""

from __future__ import annotations

import time

from ray import tune

from ssm_metarl import EvolveConfig, RecursiveSelfImprovement, TrainConfig


def main(run: str, cycles: int = 2) -> tuple[str | None, tune.ResultGrid]:
    """Two races on navigation-2d; returns why the experiment ended, and the results of its members."""
    config = TrainConfig.for_task("navigation-2d", meta_batch=6, episodes=5, seed=1)
    improvement = RecursiveSelfImprovement.for_config(config, EvolveConfig(cycles=cycles, proposals=2), run)
    results = tune.Tuner(
        improvement.trainable,
        param_space=improvement.param_space,
        tune_config=tune.TuneConfig(scheduler=improvement),
        run_config=tune.RunConfig(name="tune", storage_path=f"{improvement.population.store.folder}"),
    ).fit()
    best = results.get_best_result("return_after", "max").metrics or {}
    print(f"best member: {best['return_before']:.1f} before adaptation, {best['return_after']:.1f} after")
    print(f"{improvement.population.finished}; the policy: {improvement.checkpoint}")
    return improvement.population.finished, results


if __name__ == "__main__":
    main(time.strftime("runs/tune-%Y%m%d-%H%M%S"))
