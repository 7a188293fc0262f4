"""Let a pretrained policy act in one environment, episode after episode.

python examples/act.py
"""

from __future__ import annotations

import gymnasium

from ssm_metarl import load_player


def main(episodes: int = 5) -> list[float]:
    """Play CartPole-v1 and return the returns. Without adaptation they are low: the policy does not know the task."""
    env = gymnasium.make("CartPole-v1")
    player = load_player("pretrained:cartpole", seed=0)
    returns = []
    for episode in range(episodes):
        player.reset()  # a new episode: the memory of the last one is cleared
        observation, _ = env.reset(seed=episode)
        action, total, done = player.act(observation), 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            action = player.act(observation, reward=reward)
        returns.append(total)
    print("returns of the policy before adaptation:", returns)
    return returns


if __name__ == "__main__":
    main()
