"""Adapt a pretrained policy to an environment of your own, and let it act there.

python examples/act.py
"""

from __future__ import annotations

import gymnasium

from ssm_metarl import load_player


def main(episodes: int = 10) -> list[float]:
    """Play CartPole-v1, which is one of the tasks that the policy was meta-trained on, and return the returns."""
    env = gymnasium.make("CartPole-v1")
    player = load_player("pretrained:cartpole").adapt(env, episodes=10, steps=2)
    assert player.adaptation is not None
    print("return after 0, 1 and 2 steps:", player.adaptation.returns[0].round(1))
    returns = []
    for episode in range(episodes):
        player.reset()
        observation, _ = env.reset(seed=episode)
        action, total, done = player.act(observation), 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            action = player.act(observation, reward=reward)
        returns.append(total)
    print("returns of the adapted policy:", returns)
    return returns


if __name__ == "__main__":
    main()
