"""A self-improving run as the terminal shows it; everything is read from `rsi/state.json`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ssm_metarl.tuning.evolve import EvolveResult
from ssm_metarl.tuning.metrics import METRICS
from ssm_metarl.tuning.store import RunStore, read_state

_HEADINGS = ("#", "status", "N/H/L", "inner", "outer", "S", "ret", "spd", "gen", "eff", "stb", "comp.")
_LEGEND = (
    "N state_dim, H hidden_dim, L num_layers, S inner_steps\n"
    "ret average return, spd adaptation speed, gen generalisation\n"
    "eff meta-efficiency, stb stability, comp. composite"
)


class PopulationView:
    """Shows a run while it runs: a live table in a terminal, a line a decision elsewhere:

        with PopulationView(run_dir, console):
            evolve(config, rules, run_dir)

    Args:
        run: the run's folder, which need not be there yet.
        console: where to.
    """

    def __init__(self, run: Path, console: Console) -> None:
        self._run, self._console = run, console
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._shown = 0

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
            self._console.print(population_table(read_state(self._run)))

    def _follow(self) -> None:
        while not self._end.wait(0.5):
            self._update()

    def _update(self) -> None:
        try:
            state = read_state(self._run)
        except ValueError:  # not there yet
            return
        events = RunStore(self._run).events()
        if self._live:
            self._live.update(Group(population_table(state), *map(Text, list(_lines(events))[-5:])))
            return
        for line in list(_lines(events))[self._shown :]:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._shown += 1


def population_table(state: Mapping[str, Any]) -> Table:
    """The population at its last border: sizes, learning rates, five metrics, composite and status."""
    rules = state["config"]
    total = f" of {rules['generations']}" if rules["generations"] else ""
    best = state["archive"].get(state["best"] or "")
    caption = f"best ever {best['composite']:.3f} ({best['name']})" if best else "assessing the first policies …"
    caption = f"{_LEGEND}\n{caption}"
    table = Table(title=f"Generation {state['generation']}{total}", caption=caption, padding=(0, 0), pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    for trial in state["trials"]:
        sizes, rates, metrics = trial["sizes"], trial["learning_rates"], trial["metrics"]
        cells = [str(trial["id"]), trial["status"], "/".join(str(size) for size in sizes.values())]
        cells += [f"{rates['inner_lr']:.3g}", f"{rates['outer_lr']:.2g}", str(rates["inner_steps"])]
        # Of a child on probation nothing is known yet: the record is its parent's.
        known = trial["status"] != "on probation" and trial["composite"] is not None
        cells += [f"{metrics[name]:.2f}" if known and name in metrics else "–" for name in METRICS]
        cells.append(f"{trial['composite']:.3f}" if known else "–")
        table.add_row(*cells, style="bold" if best and trial["checkpoint"] == best["name"] else None)
    return table


def evolution_summary(result: EvolveResult) -> dict[str, Any]:
    """What `evolve --json` prints, JSON values."""
    state = result.state
    best = state["archive"].get(state["best"] or "")
    events = RunStore(result.run_dir).events()
    decisions = Counter(event["decision"] for event in events if event["kind"] == "probation")
    return {
        "run_dir": str(result.run_dir),
        "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        "generation": state["generation"],
        "finished": state["finished"],
        "best": None if best is None else {key: best[key] for key in ("name", "metrics", "composite", "interval")},
        "sizes": None if best is None else {name: best["config"][name] for name in state["trials"][0]["sizes"]},
        "learning_rates": None
        if best is None
        else {name: best["config"][name] for name in state["trials"][0]["learning_rates"]},
        "kept": decisions["kept"],
        "rolled_back": decisions["rolled back"],
        "failures": sum(event["kind"] == "failure" for event in events),
        "env_steps": sum(trial["lifetime_steps"] for trial in state["trials"]),
        "seconds": result.seconds,
        "seconds_by_phase": state["seconds"],
        "interrupted": result.signal is not None,
        "pictures": [],
    }


def decisions_table(events: list[dict[str, Any]]) -> Table:
    """Every decision but to go on, the last one first: what was changed, what became of it, and why."""
    table = Table()
    for heading in ("generation", "trial", "change", "decision", "reason"):
        table.add_column(heading, justify="right" if heading in ("generation", "trial") else "left")
    for event in reversed([event for event in events if event["kind"] != "training"]):
        cells = (str(event["generation"]), str(event["trial"]), _changes(event), event["decision"], event["reason"])
        table.add_row(*cells)
    return table


def _lines(events: list[dict[str, Any]]) -> Iterator[str]:
    """Decisions that a reader of the terminal wants to see, a line each."""
    for event in events:
        if event["kind"] == "training":
            continue
        what = f"{_changes(event)}: " if event["before"] else ""
        reason = f" ({event['reason']})" if event["reason"] else ""
        yield f"generation {event['generation']}, trial {event['trial']}: {what}{event['decision']}{reason}"


def _changes(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g} → {event['after'][name]:g}" for name, value in event["before"].items())
