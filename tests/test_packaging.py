"""The package installs as `ssm_metarl.*` and stays light where it promises to."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssm_metarl
from builders import package_files

# What a rollout worker loads must cost neither torch nor (but for the actor itself) Ray.
WITHOUT_TORCH_AND_RAY = (
    "ssm_metarl",
    "ssm_metarl.algorithms.rollouts",
    "ssm_metarl.algorithms.numpy_policy",
    "ssm_metarl.algorithms.collect",
    "ssm_metarl.algorithms.returns",
    "ssm_metarl.tasks",
)


def loaded_by_importing(module: str, cwd: Path) -> set[str]:
    """Names of the top-level packages in a fresh interpreter after `import module`."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", WITHOUT_TORCH_AND_RAY)
def test_importing_loads_neither_torch_nor_ray(module: str, tmp_path: Path) -> None:
    assert loaded_by_importing(module, tmp_path) & {"torch", "ray"} == set()


def test_importing_the_worker_does_not_load_torch(tmp_path: Path) -> None:
    assert "torch" not in loaded_by_importing("ssm_metarl.distributed.worker", tmp_path)


def test_version_is_that_of_the_distribution() -> None:
    assert ssm_metarl.__version__ == importlib.metadata.version("ssm-metarl")


def test_every_public_name_loads() -> None:
    missing = [name for name in ssm_metarl.__all__ if not hasattr(ssm_metarl, name)]
    assert missing == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ssm_metarl.no_such_name  # noqa: B018


def test_nothing_is_importable_twice(tmp_path: Path) -> None:
    program = "import importlib.util as i; print([i.find_spec(n) for n in ('algorithms', 'ssm_metarl.ssm_metarl')])"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True).stdout == (
        "[None, None]\n"
    )


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for made_from in (root, None):  # the checkout, and the archive of its sources
        if made_from is None:
            subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", tmp_path, root], check=True)
            (made_from,) = tmp_path.glob("*.tar.gz")
        out = tmp_path / made_from.name[:3]
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, made_from], check=True)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == package_files()


def test_prose_has_lines_of_120_characters() -> None:
    """But for tables, code and generated pages."""
    root = Path(ssm_metarl.__file__).parents[1]
    pages = [
        *(root / "docs").rglob("*.md"),
        *(root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
    long = []
    for page in pages:
        if page.parent.name == "results":
            continue
        code = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            if len(line) > 120 and not code and not line.lstrip().startswith(("|", "![", "<")):
                long.append(f"{page.relative_to(root)}:{number}")
    assert long == []
