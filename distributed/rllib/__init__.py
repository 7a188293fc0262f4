"""RLlib's PPO on the SSM policy: the algorithm "policy-gradient"."""
