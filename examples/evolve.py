"""A small self-improving run: it starts with a learning rate that is too small, and finds a better one by itself.

python examples/evolve.py
"""

from __future__ import annotations

import json
import time

from ssm_metarl import EvolveConfig, TrainConfig, evaluate_checkpoint, evolve


def main(run: str, budget: float = 3e5, num_tasks: int = 40) -> list[float]:
    """Improve a policy on navigation-2d and return its returns on held-out tasks after 0 and 1 inner steps."""
    config = TrainConfig.for_task("navigation-2d", meta_batch=10, outer_lr=1e-4, seed=1)
    result = evolve(config, EvolveConfig(budget=budget, cycles=0, proposals=2), run)
    assert result.checkpoint is not None
    _, *changes = json.loads((result.run_dir / "schedule.json").read_text())["options"]
    for iteration, options in changes:
        print(f"from iteration {iteration} on: {options}")
    report = evaluate_checkpoint(result.checkpoint, split="test", num_tasks=num_tasks, steps=1).summary()
    print(f"{result.state['progress']['finished']}; return after 0 and 1 inner steps: {report['return']}")
    return report["return"]


if __name__ == "__main__":
    main(time.strftime("runs/evolve-%Y%m%d-%H%M%S"))
