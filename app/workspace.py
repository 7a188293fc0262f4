"""What the page may touch: one folder of runs, the shipped models, and the jobs of one cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ssm_metarl import pretrained
from ssm_metarl.checks import brief
from ssm_metarl.cli.job import job_view, prepared
from ssm_metarl.distributed import jobs
from ssm_metarl.storage.checkpoint import load_checkpoint
from ssm_metarl.storage.contents import MANIFEST
from ssm_metarl.storage.run_folder import resolve_checkpoint
from ssm_metarl.tasks import names_code

MAX_JOBS = 2
"""Jobs that the page lets run side by side."""

Kind: TypeAlias = Literal["train", "evolve"]
"""Of a run: the command that made it."""

MARKS = {"train": "metrics.jsonl", "evolve": "rsi/state.json"}
"""By kind of run, the file that a folder of one has."""

LISTED = 100
"""Most runs that a list shows, the newest ones."""


@dataclass(frozen=True)
class Workspace:
    """The place where a page works; its handlers take names from a browser, and only this class makes paths of them.

    Attributes:
        runs: parent of the run folders; nothing outside of it is read or written.
        address: of the job server, see `distributed.jobs.connect`.
    """

    runs: Path
    address: str | None = None

    def models(self) -> list[str]:
        """What `checkpoint` takes: the shipped models, then runs and single checkpoints, newest first."""
        found: dict[str, float] = {}
        for pattern in ("*", "*/*", "*/*/*"):
            for manifest in self.runs.glob(f"{pattern}/{MANIFEST}"):
                folder = manifest.parent
                # Of a run's checkpoints, the best: the run itself stands for it.
                folder = folder.parent if folder.name.startswith("checkpoint_") else folder
                name = folder.relative_to(self.runs).as_posix()
                hidden = any(part.startswith(".") for part in Path(name).parts)
                if name != "." and not hidden and folder.resolve().is_relative_to(self.runs.resolve()):
                    found[name] = max(found.get(name, 0.0), manifest.stat().st_mtime)
        own = sorted(found, key=lambda name: -found[name])[:LISTED]
        return [pretrained.PREFIX + name for name in pretrained.names()] + own

    def folder(self, name: str | None) -> Path:
        """A folder of the runs folder by its name.

        Raises:
            ValueError: there is none, or the name leads elsewhere.
        """
        if not name:
            raise ValueError("Choose a run first.")
        if not name.isprintable():
            raise ValueError(f"{brief(name)} is no name of a run.")
        root = self.runs.resolve()
        try:
            path = (root / name).resolve()
            inside = path.is_relative_to(root) and path != root
            # What is read in a run's folder lies there, too; links to files are not followed anywhere.
            parts = [path / "rsi", path / "rsi" / "checkpoints", *path.glob("checkpoint_*")] if inside else []
            leading = [part for part in parts if not part.resolve().is_relative_to(root)]
        except (ValueError, OSError, RuntimeError) as error:  # no name of a file, or links in a ring
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{brief(name)} cannot be read: {reason}.") from None
        if not inside:
            raise ValueError(f"{brief(name)} is not in the runs folder {self.runs}: the page reads nothing else.")
        if leading:
            raise ValueError(f"{leading[0]} is not in the runs folder {self.runs}: the page reads nothing else.")
        return path

    def checkpoint(self, name: str | None) -> Path:
        """The checkpoint folder that a name means: pretrained:NAME, a run for its best one, or a checkpoint.

        Raises:
            ValueError: there is none, or the name leads out of the runs folder.
        """
        if not name:
            raise ValueError("Choose a model first.")
        if name.startswith(pretrained.PREFIX):
            return resolve_checkpoint(name)
        found = resolve_checkpoint(self.folder(name))
        return self.folder(str(found))  # it may be a link

    def playable(self, name: str | None) -> Path:
        """The same, of a model whose task is one that is known here: the page runs no code that a file names.

        Raises:
            ValueError: there is none, or its task is code; one sentence.
        """
        path = self.checkpoint(name)
        self.check_code(name, load_checkpoint(path).config.get("task"))
        return path

    def check_code(self, name: str | None, task: object) -> None:
        """Refuse a task of a run or a model that is code of its own.

        Raises:
            ValueError: it is; one sentence.
        """
        if names_code(task):
            raise ValueError(
                f"{name} names the task {brief(task)}, which is code: the page starts none, the command line does."
            )

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs as `job list` has them, newest first; none where no job server answers."""
        try:
            found = jobs.jobs(jobs.connect(self.address))
        except jobs.JobError:
            return []
        return [job_view(job) for job in reversed(found)]

    def list_runs(self, kind: Kind, found: Sequence[dict[str, Any]]) -> list[str]:
        """Names of the runs of a kind: those of jobs first, for they may have no folder yet, then by age.

        Args:
            kind: of run.
            found: the jobs.
        """
        root = self.runs.resolve()
        started = [Path(job["run_dir"]) for job in found if job["run_dir"] and job["command"].startswith(kind)]
        # A run of evolve has checkpoints in its folder, too, but no metrics.
        marked = [path for pattern in ("*", "*/*") for path in root.glob(f"{pattern}/{MARKS[kind]}")]
        marked.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        depth = len(Path(MARKS[kind]).parts)
        folders = [*started, *(path.parents[depth - 1] for path in marked)]
        inside = [path for path in folders if path.resolve().is_relative_to(root)]
        return list(dict.fromkeys(str(path.relative_to(root)) for path in inside))[:LISTED]

    def start(self, command: Sequence[str]) -> str:
        """Start a command as a job; the name of its run.

        Raises:
            ValueError: enough jobs run already, or one in the run's own folder.
            JobError: see `distributed.jobs.submit`.
        """
        found = self.jobs()
        running = [job for job in found if runs_on(job)]
        if not self.room(found):
            which = ", ".join(job["job"] for job in running)
            raise ValueError(f"{len(running)} jobs run already ({which}): stop one first, or wait.")
        words, run_dir = prepared(command, str(self.runs.resolve()))
        assert run_dir is not None
        if job := job_of(running, Path(run_dir)):
            raise ValueError(f"{Path(run_dir).name} is running already, as {job['job']}: stop it first, or wait.")
        jobs.submit(words, run_dir, self.address)
        return str(Path(run_dir).relative_to(self.runs.resolve()))

    def room(self, found: Sequence[dict[str, Any]]) -> bool:
        """Whether one more job may run beside those that do."""
        return sum(map(runs_on, found)) < MAX_JOBS

    def place(self, name: str | None) -> str:
        """A model as the command line takes it.

        Raises:
            ValueError: there is none, or its task is code; one sentence.
        """
        self.playable(name)
        shipped = str(name).startswith(pretrained.PREFIX)
        return str(name) if shipped else str(self.folder(name))

    def as_job(self, command: Sequence[str]) -> list[str]:
        """The words that start a command as the page does: as a job, with its run in this folder."""
        where = ["--address", self.address] if self.address else []
        return ["job", "start", "--storage", str(self.runs.resolve()), *where, "--", *command]

    def stop_words(self, name: str) -> list[str]:
        """The words that stop a run's job; none where none runs.

        Raises:
            ValueError: the name is no run's.
        """
        job = job_of(self.jobs(), self.folder(name))
        where = ["--address", self.address] if self.address else []
        return ["job", "stop", str(job["job"]), *where] if job and runs_on(job) else []

    def stop(self, name: str | None) -> str:
        """Have a run's job end its iteration and write a checkpoint; the job's id.

        Raises:
            ValueError: no job of it runs.
            JobError: no job server answers.
        """
        job = job_of(self.jobs(), self.folder(name))
        if job is None or not runs_on(job):
            raise ValueError(f"No job of {name} is running.")
        jobs.connect(self.address).stop_job(job["job"])
        return str(job["job"])


def runs_on(job: Mapping[str, Any] | None) -> bool:
    """Whether there is a job and it has not ended."""
    return job is not None and job["status"] not in jobs.ENDED


def job_of(found: Sequence[dict[str, Any]], run: Path) -> dict[str, Any] | None:
    """The newest job of a run's folder, of jobs that are listed newest first."""
    return next((job for job in found if job["run_dir"] and Path(job["run_dir"]) == run), None)
