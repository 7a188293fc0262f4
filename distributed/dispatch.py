"""Who plays what: parts of plays to free workers, and what becomes of workers that die or stand still."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ssm_metarl.core import Task
from ssm_metarl.distributed.play import Play
from ssm_metarl.distributed.suspicion import Suspicion
from ssm_metarl.distributed.watch import Part, SampleTimeout, Watch

if TYPE_CHECKING:
    from ssm_metarl.distributed.worker import WorkerHandle

    Held = dict[WorkerHandle, tuple[Play, Part]]
    """What each worker plays."""

PATIENCE = 10.0
"""Seconds of waiting for learners after which is looked what becomes of them."""

_log = logging.getLogger(__name__)


class Dispatcher:
    """Hands parts of plays to workers; a `Pool` has one for a run.

    Args:
        workers: of the pool.
        sample_timeout_s: see `MachineConfig`.

    Attributes:
        restarts, dropped, timed_out: see `Pool`.
        waited: called where no worker had anything to do for a while, for want of adapted weights.
    """

    def __init__(self, workers: Sequence[WorkerHandle], sample_timeout_s: SampleTimeout) -> None:
        self.restarts = 0
        self.dropped: list[Task] = []
        self.timed_out = 0
        self.waited: Callable[[], None] = lambda: None
        self._workers = workers
        self._watch = Watch(sample_timeout_s)
        self._suspicion = Suspicion()

    def play(self, *plays: Play) -> None:
        """Hand the plays' parts to free workers, those of the first one first, until none is left."""
        from ssm_metarl.distributed.worker import ready_workers

        held: Held = {}
        try:
            while (waiting := any(play.waiting for play in plays)) or held:
                for play in plays:
                    play.look_for_weights()
                for worker in self._workers:
                    if worker.call is None and (found := self._next(plays, worker)):
                        held[worker] = found
                        found[0].submit(worker, found[1])
                # A worker that is starting or restarting matters only while something waits for it.
                called = [worker for worker in self._workers if worker.call is not None]
                awaited = called if waiting else list(held)
                missing = [reference for play in plays for reference in play.missing]
                timeout = self._watch.seconds([part for _, part in held.values()])
                begin = time.perf_counter()
                for worker in ready_workers(awaited, PATIENCE if missing and not held else timeout, missing):
                    self._receive(worker, held)
                if not held and time.perf_counter() - begin >= PATIENCE:
                    self.waited()
                for worker in list(held):
                    self._look_after(worker, held)
                for play in plays:
                    if play.has_enough:
                        self._close(play, held)
        finally:
            for worker in held:  # after an exception: what they still answer belongs to no play
                worker.await_process()

    def _close(self, play: Play, held: Held) -> None:
        """Give up the tasks of a play that are not there."""
        late = [worker for worker, (own, _) in held.items() if own is play]
        parts = [*(held.pop(worker)[1] for worker in late), *play.waiting]
        play.waiting.clear()
        for worker in late:  # it may never end
            self.restarts += 1
            worker.restart()
        for task in sorted(task for part in parts for task in part.tasks):
            self.timed_out += 1
            play.lose(task, f"was given up: {play.enough} others were there")

    def _next(self, plays: Sequence[Play], worker: WorkerHandle) -> tuple[Play, Part] | None:
        """The first part that waits for a worker on this node: a suspect is rather tried where it has not been."""
        nodes = self._running_nodes()
        for play in plays:
            for part in play.waiting:
                if not play.has_weights(part):
                    continue
                if len(part.tasks) > 1 or not self._suspicion.avoided(play.key(part), worker.node, nodes):
                    play.waiting.remove(part)
                    return play, part
        return None

    def _running_nodes(self) -> set[str]:
        """Nodes with a worker that is not starting or restarting."""
        return {worker.node for worker in self._workers if not worker.starting}

    def _receive(self, worker: WorkerHandle, held: Held) -> None:
        """Take an answer of a worker: a sign of life, what it played, or that it has started."""
        from ssm_metarl.distributed.worker import WorkerDied

        node = worker.node
        try:
            answer = worker.result()
        except WorkerDied:
            if worker in held:
                self._take_back(*held.pop(worker), node)
            return
        if worker not in held:
            return
        play, part = held[worker]
        self._watch.lives(part, worker.name)
        if answer is not None:
            del held[worker]
            play.finish(part, worker, *answer)
            if len(part.tasks) == 1:
                self._suspicion.played(play.key(part))

    def _take_back(self, play: Play, part: Part, node: str) -> None:
        """Have the tasks of a worker that ended wait, one by one; drop one that keeps ending those that play it."""
        from ssm_metarl.distributed.worker import nodes_alive

        self.restarts += 1
        if len(part.tasks) == 1:
            key = play.key(part)
            self._suspicion.ended(key, node)
            if self._suspicion.condemned(key, nodes_alive(), self._running_nodes() | {node}):
                self._suspicion.forget(key)
                self.dropped.append(play.tasks[part.tasks.start])
                play.lose(part.tasks.start, "was dropped: every worker that played it alone ended")
                return
        play.waiting.extend(Part(range(i, i + 1)) for i in part.tasks)

    def _look_after(self, worker: WorkerHandle, held: Held) -> None:
        """Tell of a worker that is silent, and replace one that is so for too long."""
        play, part = held[worker]
        self._watch.tell(part, worker.name, worker.pid)
        if not self._watch.is_late(part):
            return
        _log.warning("%s is replaced.", worker.name)
        del held[worker]
        worker.restart()
        if not self._watch.bounds_calls or len(part.tasks) > 1:
            self._take_back(play, part, worker.node)
            return
        self.restarts += 1
        self.timed_out += 1
        play.lose(part.tasks.start, f"took longer than sample_timeout_s = {self._watch.timeout:g}")
