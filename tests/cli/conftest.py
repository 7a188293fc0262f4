"""The command line in this process, and a run for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from command_line import SMALL, Command, Outcome
from ssm_metarl.cli import plots
from ssm_metarl.cli.main import main
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.train import train


@pytest.fixture
def command(
    without_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command line in this process, in an empty folder, and fails where it would start Ray."""

    def run(*arguments: str | Path) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "")  # which --address sets, so that it is put back
    monkeypatch.delenv("RAY_ADDRESS")
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(TrainConfig.for_task("navigation-2d", iterations=2, inner_lr=0.2, **SMALL), folder).run_dir


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures drawn, by file name."""
    drawn: dict[str, Figure] = {}
    write = plots._write

    def keep(figure: Figure, path: Path) -> Path:
        drawn[path.name] = figure
        return write(figure, path)

    monkeypatch.setattr(plots, "_write", keep)
    return drawn
