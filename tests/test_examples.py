"""The examples run and do what they say."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ssm_metarl import SSMPolicy, TrainConfig, evaluate_checkpoint, load_policy, train
from ssm_metarl.algorithms.collect import collect_tasks, played
from ssm_metarl.seeds import seed_for

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that a test is named after, found as by `python examples/NAME.py`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module(request.node.name.removeprefix("test_"))


@pytest.mark.slow
def test_own_family(example: ModuleType, tmp_path: Path) -> None:
    before, after = example.main(str(tmp_path / "run"), iterations=4)
    assert after > before + 3, "one step finds the goal's side"


def test_act(example: ModuleType) -> None:
    assert np.mean(example.main(episodes=3)) < 100, "a policy that has not adapted does not know the task"


def test_adapt(example: ModuleType) -> None:
    (before, after), curve = example.main()
    assert after > before + 300
    assert max(curve) > curve[0] + 300


@pytest.mark.slow
def test_windy(example: ModuleType, tmp_path: Path) -> None:
    """A task's experience depends on its own task and seed alone, and the family is trained by its name."""
    family = example.Windy()
    spec = TrainConfig.for_task("windy").policy_spec(family)
    tasks, seeds = family.sample(2, np.random.default_rng(0)), [seed_for(0, task) for task in range(2)]
    weights = SSMPolicy(spec).numpy_weights()
    both = played(collect_tasks(family.make_vector_env, spec, weights, seeds, tasks, 3, family.horizon))
    alone = played(collect_tasks(family.make_vector_env, spec, weights, seeds[1:], tasks[1:], 3, family.horizon))
    assert not both.errors
    np.testing.assert_array_equal(both.returns()[1], alone.returns()[0])
    result = train(TrainConfig.for_task("windy", iterations=10, seed=1), tmp_path / "run")
    before, after = evaluate_checkpoint(result.checkpoint, num_tasks=40, steps=1).summary()["return"]
    assert after > before + 5


@pytest.mark.slow
def test_evolve(example: ModuleType, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(example.main(str(tmp_path / "run"), budget=1e5, num_tasks=4)) == 2
    assert "the budget is spent" in capsys.readouterr().out


@pytest.mark.slow
def test_tune(example: ModuleType, ray_session: None, tmp_path: Path) -> None:
    finished, results = example.main(str(tmp_path / "run"), cycles=1)
    assert (finished, len(results), results.num_errors) == ("1 cycle", 3, 0)
    best = results.get_best_result("return_after", "max").metrics
    assert best["done"] is True
    assert best["return_after"] > best["return_before"]
    assert best["env_steps"] > 0
    assert best["seconds"]["total"] > 0
    assert load_policy(tmp_path / "run")[1].progress["iteration"] > 2
