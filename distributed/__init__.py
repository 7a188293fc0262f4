"""The meta-training loop on Ray actors: workers, pool, learner, trainer and checkpoints."""
