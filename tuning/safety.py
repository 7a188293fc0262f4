"""When a policy in training has become so much worse that the run goes back to an earlier checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.tuning.race import z_score

WEIGHT = 0.3
"""Of a new level in the averages over levels."""

FALL, LEAST_FALL, GREATEST_FALL = 4.0, 0.08, 0.2
"""A level is suspicious that is below the average by as many of the levels' own deviations, within these bounds."""

CONFIRM = 2.33
"""z of a paired assessment by which a suspicion is confirmed: one of a hundred without a difference."""


@dataclass
class Level:
    """The incumbent's level, followed over stretches.

    The best of many noisy numbers is no measure of what a policy can do: a run on a plateau would always seem to have
    fallen. What a level is compared with is therefore an average, and the noise is that of the run itself.

    Attributes:
        mean: average of the levels so far, newer ones weigh more; normalised, in [0, 1].
        deviation: how far levels are from it, on average.
        count: of levels.
        peak, peak_name: greatest average so far, and the checkpoint of that moment.
    """

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0
    peak: float = 0.0
    peak_name: str | None = None

    def suspicious(self, level: float) -> bool:
        """Whether a level is far below the average (or no number at all), or the average far below its peak."""
        least = min(max(FALL * self.deviation, LEAST_FALL), GREATEST_FALL)
        return self.count > 0 and not (level >= self.mean - least and self.mean >= self.peak - least)

    def update(self, level: float, name: str) -> None:
        """Take a level that is not the start of a collapse.

        Args:
            level: normalised, in [0, 1].
            name: of the checkpoint.
        """
        if self.count == 0:
            self.mean = level
        else:
            # The mean absolute deviation of a normal variable is .8 of its standard deviation.
            share = max(WEIGHT / 2, 1 / self.count)
            self.deviation += share * (1.25 * abs(level - self.mean) - self.deviation)
            self.mean += max(WEIGHT, 1 / (self.count + 1)) * (level - self.mean)
        self.count += 1
        if self.peak_name is None or self.mean >= self.peak:
            self.peak, self.peak_name = self.mean, name


def fallen(now: Array, before: Array) -> bool:
    """Whether a policy is significantly worse than it was, on the same tasks with the same random numbers.

    Args:
        now, before: [V], normalised returns after adaptation by task.
    """
    return z_score([now], [before]) < -CONFIRM
