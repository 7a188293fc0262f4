"""Adapt a pretrained policy to one task, then to a gymnasium environment of your own.

python examples/adapt.py
"""

from __future__ import annotations

from typing import Any

import gymnasium

from ssm_metarl import adapt_checkpoint, load_player


class Mirrored(gymnasium.ActionWrapper[Any, Any, Any]):
    """Every push goes the other way."""

    def action(self, action: Any) -> Any:
        return 1 - action


def to_a_task() -> tuple[float, float]:
    """Returns of fresh episodes before and after the gradient step of meta-training, on episodes of a heavy pole."""
    summary = adapt_checkpoint("pretrained:cartpole", {"direction": -1, "masspole": 0.3}).summary()
    return summary["before"]["return"], summary["after"]["return"]


def to_an_environment() -> list[float]:
    """Returns after 0, 1 and 2 gradient steps on ten episodes of a cart-pole that no training has seen."""
    env = Mirrored(gymnasium.make("CartPole-v1"))
    player = load_player("pretrained:cartpole").adapt(env, episodes=10, steps=2)
    assert player.adaptation is not None
    return player.adaptation.returns[0].tolist()  # the best of the three is the player's


def main() -> tuple[tuple[float, float], list[float]]:
    """Do both, print the returns and return them."""
    task, environment = to_a_task(), to_an_environment()
    print(f"a task: return {task[0]:.0f} before adaptation, {task[1]:.0f} after")
    print(f"an environment: return after 0, 1 and 2 steps {[round(value) for value in environment]}")
    return task, environment


if __name__ == "__main__":
    main()
