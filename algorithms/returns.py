"""Returns, advantages and the linear feature baseline, batched over tasks, in NumPy."""

from __future__ import annotations

import numpy as np

from ssm_metarl.algorithms.rollouts import Array, Rollouts


def discounted_returns(rewards: Array, valid: Array, discount: float) -> Array:
    """Discounted sum of the rewards still to come, G_t = r_t + discount · G_{t+1}.

    Args:
        rewards: [M, T, K], any number where not `valid`.
        valid: [M, T, K] bool.
        discount: in [0, 1].

    Returns:
        [M, T, K] float64, 0 where not valid.
    """
    return generalized_advantages(rewards, np.zeros(rewards.shape), np.zeros_like(rewards[:, 0]), valid, discount, 1.0)


def generalized_advantages(
    rewards: Array, values: Array, last_values: Array, valid: Array, discount: float, gae_lambda: float
) -> Array:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16).

    Args:
        rewards: [M, T, K], any number where not `valid`.
        values: [M, T, K], baseline at each step, any number where not valid.
        last_values: [M, K], value after the last valid step: 0 where the episode truly ended, and where returns stop
            at a known horizon (the linear baseline's case).
        valid: [M, T, K] bool, a prefix of each slot.
        discount: in [0, 1].
        gae_lambda: in [0, 1]; 1 gives return minus baseline.

    Returns:
        [M, T, K] float64, 0 where not valid.
    """
    rewards = np.where(valid, rewards, 0.0).astype(np.float64)
    values = np.where(valid, values, 0.0).astype(np.float64)
    advantages = np.zeros(rewards.shape)
    following = last_values.astype(np.float64)
    running = np.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = valid[:, t]
        delta = rewards[:, t] + discount * following - values[:, t]
        running = np.where(here, delta + discount * gae_lambda * running, 0.0)
        advantages[:, t] = running
        following = np.where(here, values[:, t], following)
    return advantages


SHRINKAGE = 1.0
"""Of the linear baseline, in episodes: how much data the prior that returns do not depend on the features is worth."""


def linear_baseline(rollouts: Rollouts, targets: Array, shrinkage: float = SHRINKAGE) -> Array:
    """Fit a linear baseline to each task's returns and evaluate it on the same steps (Duan et al. 2016, appendix 2).

    Features: observation (clipped to ±10), its square, t, t², t³ (t in hundreds of steps), less their means and in
    units of their deviation over the task's steps; and 1.

    The fit is a ridge regression. Returns of successive steps share nearly all of their noise, so that K episodes
    determine little more than K coefficients, however long they are: with a constant penalty a fit to few episodes
    takes away what advantages are to tell. The penalty is the length of `shrinkage` mean episodes: a coefficient of K
    episodes is shrunk by the factor K / (K + shrinkage) where features are not correlated. Mean returns are not shrunk.

    Args:
        rollouts: one or more episode slots a task.
        targets: [M, T, K], what to predict, such as discounted returns.
        shrinkage: above 0, in episodes.

    Returns:
        [M, T, K] float64, 0 where not valid.
    """
    tasks, steps, num_episodes = rollouts.valid.shape
    observations = np.where(rollouts.valid[..., None], rollouts.observations, 0.0).astype(np.float64).clip(-10, 10)
    size = observations.shape[-1]
    time = (np.arange(steps) / 100.0)[None, :, None, None]
    features = np.empty((tasks, steps, num_episodes, 2 * size + 4))
    features[..., :size] = observations
    features[..., size : 2 * size] = observations**2
    features[..., 2 * size :] = np.concatenate([time, time**2, time**3, np.ones_like(time)], -1)
    features *= rollouts.valid[..., None]
    flat = features.reshape(tasks, steps * num_episodes, -1)
    transposed = flat.swapaxes(1, 2)
    gram = transposed @ flat
    moment = (transposed @ np.where(rollouts.valid, targets, 0.0).reshape(tasks, -1, 1))[..., 0]
    # The last feature is 1: its products are sums, from which those of what deviates from the mean follow.
    total = np.where(gram[:, -1, -1] > 0, gram[:, -1, -1], 1.0)
    mean, level = gram[:, :-1, -1] / total[:, None], moment[:, -1] / total
    squares = np.einsum("mii->mi", gram[:, :-1, :-1])
    covariance = gram[:, :-1, :-1] - total[:, None, None] * mean[:, :, None] * mean[:, None]
    varies = np.maximum(np.einsum("mii->mi", covariance), 0.0)
    varies = np.where(varies > 1e-10 * squares, varies, np.maximum(squares, 1.0))  # of a constant: nothing to fit
    length = total / np.maximum(rollouts.kept().sum(1), 1)
    penalty = np.einsum("mi,ij->mij", varies * (shrinkage * length / total)[:, None], np.eye(varies.shape[1]))
    slopes = np.linalg.solve(covariance + penalty, (moment[:, :-1] - mean * moment[:, -1:])[..., None])
    constant = level - (mean * slopes[..., 0]).sum(1)
    solution = np.concatenate([slopes, constant[:, None, None]], 1)
    return (flat @ solution).reshape(tasks, steps, num_episodes)


def tells_apart(rollouts: Rollouts, discount: float) -> Array:
    """Whether the episodes of each task show that anything can be done better or worse, [M] bool.

    They do not where their discounted returns are equal (to rounding). What is left of such returns is the misfit of
    the baseline, which would be blown up to advantages of deviation 1. A single episode shows nothing where all of its
    rewards are equal and it did not end before it was cut.

    Args:
        rollouts: M tasks.
        discount: in [0, 1].
    """
    counted = rollouts.kept()
    returns = discounted_returns(rollouts.rewards, rollouts.valid, discount)[:, 0]
    steps = rollouts.valid & counted[:, None]
    differ = _spread(returns, counted) > 1e-6 * np.abs(np.where(counted, returns, 0.0)).max(1)
    varied = _spread(rollouts.rewards, steps) > 0
    ended = (rollouts.terminated & steps).any((1, 2))
    return np.where(counted.sum(1) == 1, varied | ended, differ)


def _spread(values: Array, counted: Array) -> Array:
    """Largest less least of each task's values [M, ...] that are `counted`, [M]; 0 where none is."""
    axes = tuple(range(1, values.ndim))
    high = np.where(counted, values, -np.inf).max(axes)
    low = np.where(counted, values, np.inf).min(axes)
    return np.where(counted.any(axes), high, 0.0) - np.where(counted.any(axes), low, 0.0)


def advantages(
    rollouts: Rollouts,
    discount: float,
    gae_lambda: float,
    baseline: str = "linear",
    values: Array | None = None,
    reward_scale: float = 1.0,
    level: Array | None = None,
) -> tuple[Array, Array]:
    """Generalized advantage estimates against a baseline, not normalised.

    Args:
        rollouts: M tasks.
        discount: in [0, 1].
        gae_lambda: in [0, 1].
        baseline: "linear", fitted to each task's returns; "time", the time step's mean return over all tasks; both take
            episodes to end at a known horizon. Any other: `values`, which bootstrap where an episode was cut.
        values: [M, T + 1, K], a critic's, for each slot up to the one after its last valid step.
        reward_scale: rewards are divided by it.
        level: of "time", [T], where these are not all tasks; None: of these.

    Returns:
        Advantages and the baseline, [M, T, K] float64 each, 0 where not valid.
    """
    rewards, valid = rollouts.rewards / np.float32(reward_scale), rollouts.valid
    following = np.zeros_like(rewards[:, 0])
    if baseline not in ("linear", "time"):
        assert values is not None
        last = np.take_along_axis(values, rollouts.lengths()[:, None], 1)[:, 0]
        following = np.where((rollouts.terminated & valid).any(1), 0.0, last)
        expected = np.where(valid, values[:, :-1], 0.0)
    else:
        returns = discounted_returns(rewards, valid, discount)
        if baseline == "linear":
            expected = linear_baseline(rollouts, returns)
        else:
            means = step_means(returns, valid) if level is None else level[None, :, None]
            expected = np.where(valid, means, 0.0)
    return generalized_advantages(rewards, expected, following, valid, discount, gae_lambda), expected


def step_means(targets: Array, valid: Array) -> Array:
    """Mean target of each time step over all tasks and episode slots.

    Args:
        targets: [M, T, K], any number where not `valid`.
        valid: [M, T, K] bool.

    Returns:
        [1, T, 1] float64, 0 where none is valid.
    """
    count = np.maximum(valid.sum((0, 2), keepdims=True), 1)
    return np.asarray(np.where(valid, targets, 0.0).sum((0, 2), keepdims=True) / count)


def normalized(advantages: Array, weight: Array, axes: tuple[int, ...] = (1, 2)) -> Array:
    """Advantages with mean 0 and standard deviation 1 over each task's valid steps; 0 for a task without any.

    Args:
        advantages: [M, T, K], any number where the weight is 0.
        weight: [M, T, K], of each step in mean and deviation: whether it is valid, or a number of at least 0.
        axes: over which they are normalised; (0, 1, 2): over all tasks together.

    Returns:
        [M, T, K] float32, 0 where the weight is 0.
    """
    total = weight.sum(axes, keepdims=True)
    total = np.where(total > 0, total, 1)
    valid = weight > 0
    advantages = np.where(valid, advantages, 0.0)
    mean = (weight * advantages).sum(axes, keepdims=True) / total
    centred = (advantages - mean) * valid
    std = np.sqrt((weight * centred**2).sum(axes, keepdims=True) / total)
    return (centred / (std + 1e-8)).astype(np.float32)
