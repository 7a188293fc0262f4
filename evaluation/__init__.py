"""Evaluation of policies: held-out tasks, adaptation, and the modes of adaptation side by side."""
