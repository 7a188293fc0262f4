"""A self-improving run as the terminal shows it; everything is read from `rsi/state.json` and `rsi/events.jsonl`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ssm_metarl.cli.tables import COMPACT, number_words
from ssm_metarl.distributed.schedule import SCHEDULE
from ssm_metarl.tuning.metrics import METRICS, composite
from ssm_metarl.tuning.options import SIZES
from ssm_metarl.tuning.records import Decision, Phase
from ssm_metarl.tuning.store import RunStore, read_state

if TYPE_CHECKING:
    from ssm_metarl.tuning.evolve import EvolveResult  # loads Ray Tune, which the commands of `job` can do without

HEADINGS = dict(
    zip(METRICS, ("average\nreturn", "adapt.\nspeed", "general-\nisation", "meta-\nefficiency", "\nstability"))
)
"""Of the metrics, in two lines each."""

LINES = 5
"""Decisions below the live view, the last ones."""

WIDTH = 58
"""Characters of a line of options."""

BAR = 20
"""Columns of a bar of progress."""

Values = Mapping[str, Any]


class PopulationView:
    """Shows a run while it runs: a live view in a terminal, a line a decision elsewhere:

        with PopulationView(run_dir, console):
            evolve(config, rules, run_dir)

    Args:
        run: the run's folder, which need not be there yet.
        console: where to.
    """

    def __init__(self, run: Path, console: Console) -> None:
        self._run, self._console = run, console
        self._live = Live(console=console, refresh_per_second=2, redirect_stdout=False) if console.is_terminal else None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._shown = len(RunStore(run).events())  # of a run that is resumed

    def __enter__(self) -> PopulationView:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if error is None:
            self._update()
        if self._live:
            self._live.stop()
        elif error is None:
            self._console.print(incumbent_table(read_state(self._run)))

    def _follow(self) -> None:
        while not self._end.wait(0.5):
            self._update()

    def _update(self) -> None:
        try:
            state, events = read_state(self._run), RunStore(self._run).events()
        except ValueError:  # not there yet
            return
        if self._live:
            self._live.update(population_view(state, events))
            return
        for event in events[self._shown :]:
            self._console.print(decision_line(event), markup=False, highlight=False, soft_wrap=True)
        self._shown = max(self._shown, len(events))


def population_view(state: Values, events: Sequence[Values]) -> RenderableType:
    """All that there is to see of a run: incumbent, race or stretch, costs, and the last decisions."""
    parts: list[RenderableType] = [incumbent_table(state)]
    if state["live"]["race"]:
        parts.append(race_table(state))
    if not state["progress"]["finished"]:
        parts.append(_phase_bar(state))
    parts.append(Text(spent_words(state)))
    parts += [Text(decision_line(event), overflow="ellipsis", no_wrap=True) for event in events[-LINES:]]
    return Group(*parts)


def incumbent_table(state: Values) -> Table:
    """The policy that is handed over: its five metrics with intervals over tasks, their composite, and its options."""
    live, known = state["live"], _assessed(state)
    before_after = "" if live["returns"] is None else f", return {_arrow(live['returns'][0], live['returns'][-1])}"
    title = f"{state['base']['task']}\nincumbent at iteration {live['iteration']}{before_after}"
    table = Table(title=title, caption="\n".join(option_lines(state)), title_style="bold", **COMPACT)
    for name in METRICS:
        table.add_column(HEADINGS[name], justify="right", no_wrap=True)
    table.add_column("\ncomposite", justify="right", no_wrap=True)
    values, intervals = (known["metrics"], known["intervals"]) if known else ({}, {})
    cells = [f"{values[name]:.2f}" if name in values else "–" for name in METRICS]
    table.add_row(*cells, f"{composite(values):.3f}" if values else "–", style="bold" if values else None)
    if values:
        table.add_row(*(_range(intervals.get(name)) for name in METRICS), "", style="dim")
    return table


def race_table(state: Values) -> Table:
    """The contenders of a race: what each changes, how far it is, and why it left."""
    cycle, total = state["progress"]["cycle"] + 1, state["config"]["cycles"]
    table = Table(title=f"Race {cycle}{f' of {total}' if total else ''}", title_style="bold", **COMPACT)
    table.add_column("contender", no_wrap=True)
    for heading in ("iterations", "return", "z"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = state["incumbent"]["config"]
    for entry in state["live"]["race"]:
        option = entry["option"]
        name = "incumbent" if option is None else f"{option} {_arrow(before[option], entry['value'])}"
        score = "–" if entry["return"] is None else number_words(entry["return"])
        z = "–" if entry["z"] is None else f"{entry['z']:+.1f}"
        name += f"\n  left: {entry['reason']}" if entry["reason"] else ""
        table.add_row(name, str(entry["iterations"]), score, z, style="dim" if entry["reason"] else None)
    return table


def phase_words(state: Values) -> str:
    """What the run does now, in a few words."""
    progress, live = state["progress"], state["live"]
    if progress["finished"]:
        return f"ended: {progress['finished']}"
    if live["race"]:
        left = sum(not entry["reason"] for entry in live["race"])
        return f"race {progress['cycle'] + 1}: {left} of {len(live['race'])} contenders left"
    done, length = stretch_progress(state)
    phase = Phase.STRETCH if progress["phase"] == Phase.RACE else progress["phase"]  # a race was due, and not possible
    return f"{phase}: {done} of {length} iterations"


def race_progress(state: Values) -> tuple[int, int]:
    """Scored meta-iterations of the contenders that are left in a race, and how many they are at most."""
    left = [entry for entry in state["live"]["race"] if not entry["reason"]]
    return sum(entry["iterations"] for entry in left), sum(entry.get("of", 1) for entry in left)


def stretch_progress(state: Values) -> tuple[int, int]:
    """Meta-iterations done of the stretch, and its length."""
    progress, left = state["progress"], state["live"]["left"]
    warm_up = progress["phase"] == Phase.WARM_UP
    length = max(state["config"]["warm_up"] if warm_up else progress["length"], progress["left"])
    return length - max(left, 0), length


def spent_words(state: Values) -> str:
    """What the run has cost so far, and what of that went into losers and assessments."""
    spent, total, budget = state["progress"]["spent"], state["live"]["spent"], state["config"]["budget"]
    of = f" of {_steps(budget)}" if budget else ""
    shares = [f"{name} {spent[name] / total:.0%}" for name in ("losers", "assessments") if total]
    return " · ".join([f"spent {_steps(total)}{of} environment steps", *shares])


def option_lines(state: Values) -> list[str]:
    """The incumbent's options that may change, those that did with what they were at first; lines of `WIDTH`."""
    config, base = state["incumbent"]["config"], state["base"]
    words = [
        f"{name} {_arrow(base[name], config[name]) if config[name] != base[name] else _number(config[name])}"
        for name in state["config"]["evolve"]
    ]
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > WIDTH:
            lines.append("")
        lines[-1] += f" · {word}" if lines[-1] else word
    return lines


def evolution_summary(result: EvolveResult) -> dict[str, Any]:
    """What `evolve --json` prints, JSON values."""
    state = result.state
    progress, config = state["progress"], state["incumbent"]["config"]
    best = state["archive"].get(progress["best"] or "")
    decisions = Counter(event["decision"] for event in RunStore(result.run_dir).events())
    keys = ("name", "metrics", "intervals", "level")
    return {
        "run_dir": str(result.run_dir),
        "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        "cycle": progress["cycle"],
        "finished": progress["finished"],
        "best": None
        if best is None
        else {key: best[key] for key in keys} | {"composite": composite(best["metrics"]) if best["metrics"] else None},
        "options": {name: config[name] for name in state["config"]["evolve"]},
        "sizes": {name: config[name] for name in SIZES},
        "accepted": decisions[Decision.ACCEPTED],
        "rejected": decisions[Decision.REJECTED],
        "rolled_back": decisions[Decision.ROLLED_BACK],
        "failures": decisions[Decision.FAILED],
        "env_steps": progress["spent"]["total"],
        "losers_steps": progress["spent"]["losers"],
        "seconds": result.seconds,
        "seconds_by_phase": progress["seconds"],
        "interrupted": result.signal is not None,
        "schedule": str(result.run_dir / SCHEDULE) if result.checkpoint is not None else None,
        "pictures": [],
    }


def decisions_table(events: Sequence[Values]) -> Table:
    """Every decision, the last one first: at which iteration, what was decided, and why."""
    table = Table()
    table.add_column("iteration", justify="right")
    table.add_column("decision")
    table.add_column("what")
    for event in reversed(events):
        table.add_row(str(event["iteration"]), event["decision"], _what(event))
    return table


def decision_line(event: Values) -> str:
    """A decision as one line."""
    return f"iteration {event['iteration']}: {_what(event)}"


def _what(event: Values) -> str:
    match event["decision"]:
        case Decision.ACCEPTED:
            error = event.get("resize_error")
            lost = f", its output changed by {error:.1%}" if error else ""
            return f"race {event['cycle'] + 1} accepted {_changes(event['accepted'])}{_z_words(event)}{lost}"
        case Decision.REJECTED:
            return f"race {event['cycle'] + 1} rejected {_changes(event['changes'])}"
        case Decision.CONTINUED:
            return f"level {event['metrics']['average_return']:.3f} after a stretch{_composite_words(event)}"
        case Decision.ROLLED_BACK:
            return f"rolled back to {event['checkpoint']}: {event['reason']}"
        case Decision.REFUSED:
            return f"not rolled back: {event['reason']}"
        case Decision.FAILED:
            return f"failure of member {event['member']} in the {event['phase']}: {event['reason']}"
        case Decision.HANDED_OVER:
            weights = "running mean of weights" if event["weights"] == "mean" else "last weights"
            return f"handed over, the {weights}{_composite_words(event)}"
    return str(event["decision"])


def _changes(changes: Sequence[Values]) -> str:
    """Changes of options in words; several values of one option stand behind one name."""
    values: dict[str, list[str]] = {}
    for change in changes:
        values.setdefault(f"{change['option']} {_number(change['before'])}", []).append(_number(change["after"]))
    return ", ".join(f"{before} → {' or '.join(after)}" for before, after in values.items())


def _z_words(event: Values) -> str:
    """How far ahead of the incumbent the winner was."""
    won = event["accepted"][0]
    found = [c["z"] for c in event["contenders"] if (c["option"], c["value"]) == (won["option"], won["after"])]
    return f" (z {found[0]:+.1f})" if found and found[0] is not None else ""


def _composite_words(event: Values) -> str:
    return f", composite {composite(event['metrics']):.3f}" if event["metrics"] else ""


def _assessed(state: Values) -> Values | None:
    """The record with metrics that shows what is handed over."""
    best = state["archive"].get(state["progress"]["best"] or "")
    return best if best and best["metrics"] else None


def _phase_bar(state: Values) -> RenderableType:
    """How far the race or the stretch is, and when it ends; an assessment only that it goes on."""
    race = bool(state["live"]["race"])
    (done, length), pace = race_progress(state) if race else stretch_progress(state), state["live"].get("pace")
    assesses = not race and done >= length
    eta = "" if race or assesses or pace is None else f"ETA {timedelta(seconds=round(pace * (length - done)))}"
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(None if assesses else length, done, width=BAR, pulse=assesses)
    grid.add_row("assessment" if assesses else phase_words(state), bar, eta)
    return grid


def _steps(count: float) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def _range(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _arrow(before: float, after: float) -> str:
    return f"{_number(before)} → {_number(after)}"
