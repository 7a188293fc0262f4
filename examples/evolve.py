"""A small self-improving run: two trials under Ray Tune, whose options mutate from generation to generation.

python examples/evolve.py
"""

from __future__ import annotations

import time

from ssm_metarl import EvolveConfig, TrainConfig, evaluate_checkpoint, evolve


def main(run: str, generations: int = 3, num_tasks: int = 40) -> list[float]:
    """Evolve on navigation-2d and return the best policy's returns on held-out tasks after 0 and 1 inner steps."""
    config = TrainConfig.for_task("navigation-2d", meta_batch=20, seed=1)
    result = evolve(config, EvolveConfig(population=2, generations=generations, validation_tasks=10), run)
    assert result.checkpoint is not None
    report = evaluate_checkpoint(result.checkpoint, split="test", num_tasks=num_tasks, steps=1).summary()
    print(f"{result.state['finished']} in {result.seconds:.0f} s; decisions in {result.run_dir}/rsi/events.jsonl")
    print(f"return of the best policy after 0 and 1 inner steps: {[round(value, 1) for value in report['return']]}")
    return report["return"]


if __name__ == "__main__":
    main(time.strftime("runs/evolve-%Y%m%d-%H%M%S"))
