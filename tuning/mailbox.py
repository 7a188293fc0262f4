"""Where the members of a run get their assignments and hand each other rollouts: an actor without a processor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssm_metarl.algorithms.rollouts import Rollouts


class _Mailbox:
    """The assignments of the moment, the last rollouts that were offered, and what members have to tell."""

    def __init__(self) -> None:
        self._assignments: dict[int, dict[str, Any]] = {}
        self._offered: tuple[str, Any] = ("", None)
        self._notes: list[str] = []
        self._closed = False
        self._news = asyncio.Condition()
        self._places: dict[int, tuple[str, float, float]] = {}
        self._waiting: dict[int, tuple[object, int]] = {}  # each member's call, and the number of its last assignment

    async def place(self, member: int, node: str, own: float, others: float) -> None:
        """Know the node of a member, its trainer's processors, and those of its workers and learners."""
        self._places[member] = node, own, others

    async def put(self, assignments: dict[int, dict[str, Any]]) -> None:
        """Replace all assignments: a member without one waits, also where its process was started again."""
        async with self._news:
            self._assignments = assignments
            self._news.notify_all()

    async def close(self) -> None:
        """Tell all members that the run is over."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def next(self, member: int, after: int) -> dict[str, Any] | None:
        """A member's assignment with a number above `after`, or None at the end of the run.

        A member whose process was started again calls anew: then the call of the process that is gone ends.
        """
        call = object()

        def is_last() -> bool:
            return self._waiting.get(member, (None, 0))[0] is call

        async with self._news:
            self._waiting[member] = call, after
            self._news.notify_all()
            await self._news.wait_for(lambda: self._closed or not is_last() or self._is_new(member, after))
            if not is_last():
                return None
            del self._waiting[member]
        return None if self._closed else self._assignments[member]

    def _is_new(self, member: int, after: int) -> bool:
        return bool(self._assignments.get(member, {"number": -1})["number"] > after)

    async def threads(self, member: int) -> int:
        """The processors of a member's trainer, and its part of those of the members on its node that have no work."""
        if member not in self._places:
            return 1
        node, own, _ = self._places[member]
        here = {other: place for other, place in self._places.items() if place[0] == node}
        waiting = {other: after for other, (_, after) in self._waiting.items() if other in here}
        idle = [other for other, after in waiting.items() if not self._is_new(other, after)]
        spare = sum(sum(here[other][1:]) for other in idle)
        return max(1, int(own + spare / (len(here) - len(idle)) + 0.01))  # shares of a processor are rounded down

    async def offer(self, key: str, rollouts: list[Any]) -> None:
        """Keep a reference to rollouts; it takes the place of the one before."""
        self._offered = (key, rollouts)

    async def fetch(self, key: str) -> list[Any]:
        """The reference that was offered under a name."""
        return self._offered[1] if self._offered[0] == key else []

    async def tell(self, line: str) -> None:
        """Take a line for the run's terminal."""
        async with self._news:
            self._notes.append(line)
            self._news.notify_all()

    async def notes(self) -> list[str]:
        """The lines since the last time, as soon as there is one; none at the end of the run."""
        async with self._news:
            await self._news.wait_for(lambda: self._closed or self._notes)
        lines, self._notes = self._notes, []
        return lines


class RayExchange:
    """An `Exchange` over an actor; rollouts go through Ray's object store.

    Args:
        actor: handle of the actor.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def next(self, member: int, after: int) -> dict[str, Any] | None:
        """See `Exchange`; waits without a limit."""
        answer: dict[str, Any] | None = ray.get(self.actor.next.remote(member, after))
        return answer

    def threads(self, member: int) -> int:
        """See `Exchange`."""
        found: int = ray.get(self.actor.threads.remote(member))
        return found

    def offer(self, key: str, rollouts: Sequence[Rollouts]) -> None:
        """See `Exchange`."""
        ray.get(self.actor.offer.remote(key, [ray.put(list(rollouts))]))

    def fetch(self, key: str) -> Sequence[Rollouts]:
        """See `Exchange`; nothing where the process that offered them is gone."""
        references = ray.get(self.actor.fetch.remote(key))
        try:
            return ray.get(references[0]) if references else ()
        except ray.exceptions.RayError:
            return ()


def start_mailbox(name: str) -> RayExchange:
    """Start the actor on this node; it ends with this process."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Mailbox).options(name=name, num_cpus=0, scheduling_strategy=node, max_concurrency=1000)
    return RayExchange(actor.remote())


class _Teller(logging.Handler):
    """Sends what this package logs in a member's process to the mailbox."""

    def __init__(self, member: int, actor: Any) -> None:
        super().__init__(logging.WARNING)
        self._member, self._actor = member, actor

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line."""
        self._actor.tell.remote(f"member {self._member}: {record.getMessage()}")


def connect(exchange: Any, member: int, processors: Sequence[float] = (1.0,)) -> Any:
    """The exchange that a config names: the actor of that name, or the object itself.

    What this process logs goes to an actor, too, for the terminal of the run.

    Args:
        exchange: a name or an object.
        member: who asks.
        processors: of its trainer, and of each of its workers and learners.
    """
    if not isinstance(exchange, str):
        return exchange
    actor = ray.get_actor(exchange)
    log = logging.getLogger("ssm_metarl")
    for handler in [handler for handler in log.handlers if isinstance(handler, _Teller)]:
        log.removeHandler(handler)
    log.addHandler(_Teller(member, actor))
    actor.place.remote(member, ray.get_runtime_context().get_node_id(), processors[0], sum(processors[1:]))
    return RayExchange(actor)
