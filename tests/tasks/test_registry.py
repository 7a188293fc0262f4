"""The registry of families: names, what a wrong one is told, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest

from ssm_metarl.tasks import TaskDistribution, make, names, register
from ssm_metarl.tasks import registry as base

FAMILIES = ("cartpole", "navigation-2d")


class TestRegistry:
    def test_the_built_in_families(self) -> None:
        assert set(FAMILIES) <= set(names())
        assert all(make(name).name == name for name in FAMILIES)
        assert make("cartpole") is not make("cartpole")

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("navigation2d", "navigation-2d"), ("CartPole-v1", "cartpole"), ("navigaton-2d", "navigation-2d")],
    )
    def test_unknown_name_gives_the_nearest_and_all(self, wrong: str, right: str) -> None:
        with pytest.raises(ValueError, match=f"task family '{wrong}', did you mean '{right}'") as error:
            make(wrong)
        assert ", ".join(names()) in str(error.value)

    @pytest.mark.parametrize("wrong", ["", "zzz", None, ["cartpole"], "\0", "a" * 5000])
    def test_a_name_like_no_other(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="no task family") as error:
            make(wrong)
        assert ", ".join(names()) in str(error.value)

    def test_any_factory_can_be_registered_and_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))

        def broken() -> TaskDistribution:
            raise RuntimeError("no such simulator")

        register("faulty", broken)
        with pytest.raises(RuntimeError, match="no such simulator"):
            make("faulty")
        register("faulty", broken)  # the same one: a module that is imported twice
        cartpole = type(make("cartpole"))
        with pytest.raises(ValueError, match=r"'faulty' is registered already; replace=True takes its place\.$"):
            register("faulty", cartpole)
        register("faulty", cartpole, replace=True)
        assert make("faulty").name == "cartpole"
        assert "faulty" in names()

    def test_a_faulty_family_reaches_the_worker_that_it_is_to_fail(self) -> None:
        """Workers get the instance, not the name: a class that their process cannot import travels too."""

        class Faulty(type(make("cartpole"))):  # type: ignore[misc]
            def make_vector_env(self, tasks: Any, num_episodes: int) -> Any:
                raise RuntimeError("the simulator crashed")

        faulty = cloudpickle.loads(cloudpickle.dumps(Faulty()))
        assert faulty.sample(1, np.random.default_rng(0))
        with pytest.raises(RuntimeError, match="the simulator crashed"):
            faulty.make_vector_env([], 1)


def test_importing_tasks_loads_no_learning_library() -> None:
    heavy = {"torch", "ray", "pandas", "matplotlib", "jax", "pygame"}
    code = f"import sys, ssm_metarl.tasks; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
