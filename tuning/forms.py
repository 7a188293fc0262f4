"""What the files of a self-improving run must hold: state.json, a line of events.jsonl, and a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssm_metarl.config import TrainConfig
from ssm_metarl.storage.documents import (
    Form,
    any_number,
    anything,
    both,
    list_of,
    map_of,
    maybe,
    number,
    one_of,
    record,
    text,
    whole,
)
from ssm_metarl.tuning.config import EvolveConfig
from ssm_metarl.tuning.metrics import METRICS
from ssm_metarl.tuning.options import OPTIONS
from ssm_metarl.tuning.records import Decision, Phase, Status

_OPTION = one_of(tuple(OPTIONS))
_PHASE, _DECISION, _STATUS = (one_of([str(each) for each in kind]) for kind in (Phase, Decision, Status))
_METRICS = record({}, dict.fromkeys(METRICS, number()))
_ALL_METRICS = record({"average_return": number()}, dict.fromkeys(METRICS, number()))
_INTERVALS = record({}, dict.fromkeys(METRICS, maybe(list_of(number(), 2, 2))))
_SPENT = record(dict.fromkeys(("total", "losers", "charged", "assessments"), whole()))
_ROW = list_of(maybe(number()), 1)
_CHANGE = record({"option": _OPTION, "before": number(), "after": number()}, others=True)


def _train_config(at: str, value: Any) -> None:
    """The options of `TrainConfig`, all of them."""
    record({}, others=True)(at, value)
    try:
        TrainConfig.from_checkpoint(value)
    except ValueError as error:
        raise ValueError(f"{at} is impossible: {str(error).rstrip('.')}") from None


def _rules(at: str, value: Any) -> None:
    """The rules of a run, all of them."""
    record(dict.fromkeys(EvolveConfig.__dataclass_fields__, anything))(at, value)
    record({"race": map_of(anything), "evolve": list_of(_OPTION), "bounds": map_of(anything)}, others=True)(at, value)
    try:
        EvolveConfig.from_dict(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{at} is impossible: {str(error).rstrip('.')}") from None


_PATH = list_of(list_of(anything, 2, 2))


def _path(at: str, value: Any) -> None:
    """Options that changed, by meta-iteration."""
    _PATH(at, value)
    for index, (iteration, options) in enumerate(value):
        whole()(f"{at}[{index}][0]", iteration)
        map_of(anything)(f"{at}[{index}][1]", options)


_CONTENDER = record(
    {
        "member": whole(),
        "status": _STATUS,
        "option": maybe(_OPTION),
        "value": maybe(number()),
        "iterations": whole(),
        "return": maybe(number()),
        "z": maybe(number()),
        "reason": text,
        "curve": list_of(number()),
    },
    {"of": whole(1)},
    others=True,
)

_RECORD = record(
    {
        "name": text,
        "iteration": whole(),
        "env_steps": whole(),
        "cycle": whole(),
        "config": _train_config,
        "path": _path,
        "level": maybe(number()),
        "metrics": _METRICS,
        "intervals": _INTERVALS,
        "handed_over": one_of(("last", "mean")),
    },
    others=True,
)

_INCUMBENT = record(
    {
        "member": whole(),
        "config": _train_config,
        "checkpoint": maybe(text),
        "iteration": whole(),
        "env_steps": whole(),
        "iteration_steps": number(low=0.0),
        "path": _path,
        "latest": list_of(list_of(_ROW, 1)),
        "curve": list_of(_ROW),
    },
    others=True,
)

_PROGRESS = record(
    {
        "cycle": whole(),
        "phase": _PHASE,
        "left": whole(),
        "length": whole(),
        "flat": whole(),
        "price": number(above=0.0),
        "best": maybe(text),
        "failures": whole(),
        "collapses": whole(),
        "assignments": whole(),
        "spent": _SPENT,
        "seconds": map_of(number(low=0.0)),
        "finished": maybe(text),
    },
    others=True,
)

_LIVE = record(
    {
        "phase": _PHASE,
        "race": list_of(_CONTENDER),
        "iteration": whole(),
        "left": whole(low=-(2**62)),
        "returns": maybe(list_of(any_number, 1)),
        "spent": whole(),
        "pace": maybe(number(low=0.0)),
        "members": list_of(_STATUS, 1),
    },
    others=True,
)

_TALLY = record(
    {"factor": number(above=0.0), "direction": whole(-1, 1), "lean": whole(-1, 1), "wins": number(), "losses": number()}
)

_LEVEL = record(
    {
        "mean": number(),
        "deviation": number(low=0.0),
        "count": whole(),
        "peak": number(),
        "peak_name": maybe(text),
    },
    others=True,
)

_OF_DECISION: Mapping[str, Form] = {
    Decision.ACCEPTED: record(
        {
            "accepted": list_of(_CHANGE, 1),
            "changes": list_of(_CHANGE),
            "contenders": list_of(_CONTENDER, 1),
            "resize_error": maybe(number(low=0.0)),
        },
        others=True,
    ),
    Decision.REJECTED: record(
        {"accepted": list_of(_CHANGE), "changes": list_of(_CHANGE), "contenders": list_of(_CONTENDER, 1)}, others=True
    ),
    Decision.CONTINUED: record(
        {"metrics": _ALL_METRICS, "intervals": _INTERVALS, "curve": list_of(number())}, others=True
    ),
    Decision.ROLLED_BACK: record({"checkpoint": text, "reason": text}, others=True),
    Decision.REFUSED: record({"reason": text}, others=True),
    Decision.FAILED: record({"member": whole(), "reason": text}, others=True),
    Decision.HANDED_OVER: record({"weights": one_of(("last", "mean")), "metrics": _METRICS}, others=True),
}

_EVENT = record(
    {
        "time": number(low=0.0),
        "cycle": whole(),
        "phase": _PHASE,
        "decision": _DECISION,
        "iteration": whole(),
        "env_steps": whole(),
        "spent": _SPENT,
    },
    {"contenders": list_of(_CONTENDER), "accepted": list_of(_CHANGE), "metrics": _METRICS, "intervals": _INTERVALS},
    others=True,
)


def event_form(at: str, value: Any) -> None:
    """A decision, with what belongs to its kind."""
    _EVENT(at, value)
    _OF_DECISION[value["decision"]](at, value)


REQUEST_FORM = record({"checkpoint": text, "time": number(low=0.0)})

_STATE = record(
    {
        "format": whole(),
        "config": _rules,
        "base": _train_config,
        "incumbent": _INCUMBENT,
        "progress": _PROGRESS,
        "options": record(
            {"names": list_of(_OPTION), "bounds": map_of(list_of(number(), 2, 2)), "tallies": map_of(_TALLY)}
        ),
        "level": _LEVEL,
        "archive": map_of(_RECORD),
        "events_before": whole(),
        "time": number(low=0.0),
        "live": _LIVE,
        "events": list_of(event_form),
    },
    others=True,
)


def _consistent(at: str, state: Any) -> None:
    """One task throughout, members and records that there are, and matrices of equal size."""
    incumbent, archive, base = state["incumbent"], state["archive"], state["base"]
    for name, config in [("incumbent", incumbent["config"]), *((key, each["config"]) for key, each in archive.items())]:
        for key in ("task", "task_options", "task_ranges"):
            if config[key] != base[key]:
                raise ValueError(f"{name!r} has another {key} than 'base'")
    for key, each in archive.items():
        if each["name"] != key:
            raise ValueError(f"'archive' has {each['name']!r} under the name {key!r}")
    rows = [len(row) for matrix in incumbent["latest"] for row in matrix] + [len(row) for row in incumbent["curve"]]
    columns = {len(matrix) for matrix in incumbent["latest"]}
    if len(set(rows)) > 1 or len(columns) > 1:
        raise ValueError("'incumbent' has matrices of other sizes")


STATE_FORM: Form = both(_STATE, _consistent)
"""Of `state.json`."""
