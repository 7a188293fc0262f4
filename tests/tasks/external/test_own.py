"""Families module:attribute: the user's own environments, factories and families."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest

from external_environments import LINE, assert_refused, check_conventions, draw, play, rollouts
from ssm_metarl.tasks import make
from ssm_metarl.tasks.external.names import from_name
from ssm_metarl.tasks.external.own import TaskFamily


class TestTaskFamily:
    def test_tasks_are_the_environments_own(self, module: Callable[[str], str]) -> None:
        name = f"{module(LINE)}:Line"
        family = from_name(name)
        assert isinstance(family, TaskFamily)
        assert (family.name, family.horizon, from_name(name, {}, 5).horizon) == (name, 12, 5)
        tasks = draw(family, 4)
        assert json.loads(json.dumps(tasks)) == tasks
        assert draw(family, 4) == tasks == family.sample(4, np.random.default_rng(0), "validation")
        assert draw(family, 4, seed=1) != tasks
        assert draw(family, 0) == []
        check_conventions(family).close()
        with pytest.raises(ValueError, match="no split 'tset', did you mean 'test'"):
            family.sample(1, np.random.default_rng(0), "tset")
        for wrong in (([], 1), (tasks, 0)):
            with pytest.raises(ValueError, match="one task and one slot"):
                family.make_vector_env(*wrong)

    def test_a_task_is_applied_to_its_slots_at_every_reset(self, module: Callable[[str], str]) -> None:
        family = from_name(f"{module(LINE)}:Line")
        tasks: list[Any] = [{"goal": [3.0], "name": "right"}, {"goal": [-3.0], "name": "left"}]
        played = play(family, tasks, num_episodes=2, steps=40)
        ends = played[:, :, 2:].any(-1)
        assert ends.sum(0).min() >= 3
        goals = np.array([3.0, 3.0, -3.0, -3.0])
        distance = abs(played[1:, :, 0] - goals)
        np.testing.assert_allclose(-played[1:, :, 1][~ends[1:]], distance[~ends[1:]], rtol=1e-5)
        assert tasks[0] == {"goal": [3.0], "name": "right"}

    def test_the_example_of_the_docs(self, module: Callable[[str], str]) -> None:
        (page,) = (Path(__file__).parents[3] / "docs").rglob("own-environments.md")
        (source,) = (block for block in page.read_text().split("```") if "class MyEnv" in block)
        family = from_name(f"{module(source.removeprefix('python'))}:MyEnv")
        assert family.horizon == 50
        record = rollouts(family, draw(family, 3))
        assert not record.errors
        assert record.valid.all()

    @pytest.mark.parametrize("argument", ["rng", "seed"])
    def test_sampling_may_take_its_chance_as_an_argument(self, module: Callable[[str], str], argument: str) -> None:
        source = LINE.replace("(self, n)", f"(self, n, {argument}=None)")
        source = source.replace("self.np_random.normal(size=(n", f"np.random.default_rng({argument}).normal(size=(n")
        family = from_name(f"{module(source)}:Line")
        assert draw(family, 3) == draw(family, 3) != draw(family, 3, seed=1)
        rng = np.random.default_rng(0)
        assert family.sample(3, rng) != family.sample(3, rng)

    def test_global_generators_are_left_alone(self, module: Callable[[str], str]) -> None:
        np.random.seed(3)  # noqa: NPY002
        before = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
        name = module(LINE)
        play(from_name(f"{name}:Line"), draw(from_name(f"{name}:Line"), 2))
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index] # noqa: NPY002
        source = LINE.replace("self.np_random.normal(size=(n", "np.random.normal(size=(n")
        assert_refused("gives other tasks for the same seed", f"{module(source)}:Line")

    def test_a_factory_may_wrap_it(self, module: Callable[[str], str]) -> None:
        source = LINE.replace("    horizon = 12\n", "") + (
            "\ndef limited():\n"
            "    if 'Limited-v0' not in gymnasium.registry:\n"
            "        gymnasium.register('Limited-v0', Line, max_episode_steps=6)\n"
            "    return gymnasium.make('Limited-v0')\n"
        )
        family = from_name(f"{module(source)}:limited")
        gymnasium.registry.pop("Limited-v0")
        assert family.horizon == 6

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (("Line(", "Lime("), "no attribute of adapted_module_.* 'Line', did you mean 'Lime'"),
            (("sample_tasks", "draw_tasks"), "has no sample_tasks, which tasks need"),
            (("gymnasium.Env)", "object)"), "must make a gymnasium.Env, not Line"),
            (("    horizon = 12", "    horizon = 0"), "the horizon must be an integer of 1 or more, not 0"),
            (("    horizon = 12", ""), "has no time limit of its own"),
            (("    horizon = 12", "    def __init__(self, size): pass"), "cannot be made: TypeError: .*'size'"),
            (
                ("    horizon = 12", "    def __init__(self): raise OSError('no\\nlicence')"),
                "made: OSError: no licence",
            ),
            (("import gymnasium,", "import no_such_simulator,"), "cannot be imported: ModuleNotFoundError: No module"),
            (("class Line", "class class"), "cannot be imported: SyntaxError"),
            (('"goal": goal', '"goal": self'), "cannot draw tasks: a task must be JSON values"),
            (("size=(n, 1)", "size=(n + 1, 1)"), "cannot draw tasks: sample_tasks returned 4 tasks, not 3"),
            (("goals = self", "goals = this"), "cannot draw tasks: NameError"),
        ],
    )
    def test_what_is_refused(self, module: Callable[[str], str], change: tuple[str, str], match: str) -> None:
        assert change[0] in LINE
        assert_refused(match, f"{module(LINE.replace(*change))}:Line")

    def test_options_are_the_arguments_of_its_constructor(self) -> None:
        family = make("habits:Sized", {"size": 3, "names": ["a"], "horizon": 5})
        assert (family.observation_space.shape, family.horizon) == ((3,), 5)
        other = cloudpickle.loads(cloudpickle.dumps(family))
        assert draw(other, 2) == draw(family, 2)
        np.testing.assert_array_equal(play(other, draw(family, 2)), play(family, draw(family, 2)))
        with pytest.raises(ValueError, match="no option of 'habits:Sized' 'sice', did you mean 'size'"):
            make("habits:Sized", {"sice": 3})

    def test_options_of_a_family_of_ones_own(self, module: Callable[[str], str]) -> None:
        source = """
            from ssm_metarl.tasks.navigation import Navigation2D
            class Family(Navigation2D):
                def __init__(self, name="mine"):
                    super().__init__()
                    self.name = name
            family = Family()
        """
        name = module(source)
        assert make(f"{name}:Family", {"name": "other"}).name == "other"
        with pytest.raises(ValueError, match="a family that was made already: it takes no name"):
            make(f"{name}:family", {"name": "other"})

    def test_names_of_nothing(self, module: Callable[[str], str]) -> None:
        for wrong in ("", "windy", "a:b:c", ":x", "x:", "a b:c", "1:2", "../x:y"):
            assert_refused("gym:<environment id> or module:attribute, not", wrong)
        assert_refused("There is no module 'no_such_module', neither installed nor in", "no_such_module:X")
        assert_refused("must be a class or a function, not 3.14", "math:pi")
        assert_refused("must make a gymnasium.Env, not str", "os:getcwd")
        name = f"{module(LINE)}:Line"
        assert_refused("Ranges are for gym: environments", name, {"goal": [0, 1]})

    def test_the_current_directory_is_searched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also by a family that is unpickled elsewhere, which has to import the module anew."""
        monkeypatch.setattr(sys, "path", [*sys.path])
        (tmp_path / "adapted_here.py").write_text(LINE)
        monkeypatch.chdir(tmp_path)
        family = from_name("adapted_here:Line")
        assert str(tmp_path) in sys.path
        expected = play(family, draw(family, 2))
        sent = cloudpickle.dumps(family)
        monkeypatch.chdir("/")
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
        monkeypatch.delitem(sys.modules, "adapted_here")
        arrived = cloudpickle.loads(sent)
        assert "adapted_here" not in sys.modules
        np.testing.assert_array_equal(play(arrived, draw(arrived, 2)), expected)

    @pytest.mark.parametrize("attribute", ["Family", "family", "Family.make"])
    def test_a_family_is_used_as_it_is(self, module: Callable[[str], str], attribute: str) -> None:
        source = """
            from ssm_metarl.tasks.navigation import Navigation2D
            class Family(Navigation2D):
                name = "mine"
                @classmethod
                def make(cls):
                    return cls()
            family = Family()
        """
        name = f"{module(source)}:{attribute}"
        family = from_name(name)
        assert (type(family).__name__, family.name) == ("Family", "mine")
        assert_refused("has a horizon of its own, 100 steps", name, {}, 50)
