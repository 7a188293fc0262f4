"""The mathematics of meta-learning in torch and NumPy: policies, rollouts, adaptation; no Ray, no tasks."""
