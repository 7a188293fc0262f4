"""A self-improving run's files without a run: its state before it begins, and decisions as it logs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssm_metarl.config import TrainConfig
from ssm_metarl.tasks import ReferenceReturns
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.population import Population
from ssm_metarl.tuning.store import RunStore

REFERENCE = ReferenceReturns(random=-50.0, random_sd=10.0, oracle=-10.0)


def fresh_run(folder: Path, **rules: Any) -> Population:
    """A run in a folder that has not begun."""
    store = RunStore(folder)
    store.create()
    population = Population(EvolveConfig(**rules), TrainConfig().to_dict(), REFERENCE, store)
    population.commit()
    return population


def save(population: Population) -> None:
    """Write the state as a test has changed it."""
    population._saved = population._snapshot()
    population.commit()


def event(phase: str, decision: str, iteration: int = 3, **more: Any) -> dict[str, Any]:
    """A decision as `Population` logs it."""
    steps = 10_000 * iteration
    spent = {"total": 2 * steps, "losers": steps, "charged": 0, "assessments": 0}
    common = {"time": 0.0, "cycle": 0, "phase": phase, "decision": decision, "iteration": iteration}
    return {**common, "env_steps": steps, "spent": spent, **more}


def contenders() -> list[dict[str, Any]]:
    """An incumbent and two challengers, one of which is ahead and the other has left."""
    values: list[tuple[Any, ...]] = [
        (None, None, -30.0, None, ""),
        ("outer_lr", 0.01, -20.0, 2.3, ""),
        ("outer_lr", 0.0001, -35.0, -1.2, "1.2 standard errors behind"),
    ]
    names = ("option", "value", "return", "z", "reason")
    same = {"iterations": 2, "of": 3, "status": "challenger", "curve": [0.2, 0.3, 0.4]}
    return [{**same, **dict(zip(names, each, strict=True)), "member": member} for member, each in enumerate(values)]


def race(number: int, won: bool) -> dict[str, Any]:
    """The decision about a race."""
    changes = [{"option": "outer_lr", "before": 0.001, "after": after} for after in (0.01, 0.0001)]
    decided = {"changes": changes, "accepted": changes[:1] if won else [], "contenders": contenders()}
    return event("race", "accepted" if won else "rejected", 4 * number, losers=100, resize_error=None, **decided)
