"""Safety: what a mutation must show to be kept, and when a run goes back or stops."""

from __future__ import annotations

from dataclasses import dataclass

from ssm_metarl.checks import check_count, check_number
from ssm_metarl.tuning.metrics import Comparison


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """The constants of the rules.

    Attributes:
        keep_level: of the two-sided paired bootstrap interval of child less parent.
        keep_margin: a child is kept only if that interval's lower bound is above minus this.
        step_tolerance: child and parent are compared only if their environment steps of training since the fork differ
            by at most this share of a generation's.
        floor_margin: a composite this far below the first checkpoint's is a failure.
        collapse_margin: a population wholly this far below the best ever is a failure.
        max_failures: as many in a row stop the experiment.
    """

    keep_level: float = 0.90
    keep_margin: float = 0.02
    step_tolerance: float = 0.2
    floor_margin: float = 0.10
    collapse_margin: float = 0.05
    max_failures: int = 3

    def __post_init__(self) -> None:
        check_number("keep_level", self.keep_level, above=0.0, high=0.999)
        for name in ("keep_margin", "step_tolerance", "floor_margin", "collapse_margin"):
            check_number(name, getattr(self, name), low=0.0)
        check_count("max_failures", self.max_failures, 1)


def keeps(comparison: Comparison, config: SafetyConfig) -> tuple[bool, str]:
    """Whether a child stays after its probation, and why.

    Args:
        comparison: of its composite with that of its parent continued unmutated for as many steps.
    """
    figures = f"composite {comparison.mean:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]"
    if not comparison.mean > 0:
        return False, f"{figures}: not above its parent"
    if not comparison.low > -config.keep_margin:
        return False, f"{figures}: the lower bound is not above {-config.keep_margin:g}"
    return True, f"{figures}: above its parent"


def below_floor(composite: float, first: float, config: SafetyConfig) -> bool:
    """Whether a composite is too far below the first checkpoint's (or no number at all)."""
    return not composite >= first - config.floor_margin


def collapsed(best_now: float, best_ever: float, config: SafetyConfig) -> bool:
    """Whether even the best of the population is too far below the best ever."""
    return not best_now >= best_ever - config.collapse_margin
