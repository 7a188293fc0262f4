"""External environments that are kept between batches, and what is played with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest

from builders import assert_same
from external_environments import LINE, draw, play, rollouts
from ssm_metarl.tasks import TaskDistribution
from ssm_metarl.tasks.external import family as adapter
from ssm_metarl.tasks.external.names import from_name


class TestReuse:
    def test_a_slot_depends_on_its_task_seed_and_actions_alone(self, family: TaskDistribution) -> None:
        """New or used, alone, beside others or at the same time as another batch: the same bits."""
        tasks = draw(family, 4)
        seeds = [11, 12, 13, 14, 15, 16, 17, 18]
        first = play(family, tasks, 2, seeds=seeds)
        np.testing.assert_array_equal(play(family, tasks, 2, seeds=seeds), first)
        play(family, draw(family, 3, seed=5), 3)
        np.testing.assert_array_equal(play(family, tasks[1:3], 2, seeds=seeds[2:6], close=False), first[:, 2:6])
        np.testing.assert_array_equal(play(family, tasks[::-1], 1, seeds=seeds[6::-2]), first[:, 6::-2])
        np.testing.assert_array_equal(play(family, tasks, 2, seeds=seeds), first)
        other = cloudpickle.loads(cloudpickle.dumps(family))
        np.testing.assert_array_equal(play(other, tasks, 2, seeds=seeds), first)

    def test_environments_are_lent_again_to_one_batch_at_a_time(self, family: Any) -> None:
        tasks = draw(family, 2)
        one = family.make_vector_env(tasks, 2)
        beside = family.make_vector_env(tasks, 2)
        assert not {map(id, one.envs)} & {map(id, beside.envs)}
        lent = {id(env) for env in one.envs}
        one.close()
        one.close()
        assert {id(env) for env in family.make_vector_env(tasks, 2).envs} == lent

    def test_environments_of_tasks_that_are_over_are_not_kept(self) -> None:
        family = from_name("gym:Pendulum-v1", {"g": [8, 12]})
        for seed in range(3):
            family.make_vector_env(draw(family, 5, seed), 2).close()
        assert sum(map(len, family._kept.idle.values())) == 10  # type: ignore[attr-defined]

    def test_a_pickle_holds_no_environment(self, family: Any) -> None:
        before = len(cloudpickle.dumps(family))
        family.make_vector_env(draw(family, 3), 2).close()
        assert family._kept.idle
        assert len(cloudpickle.dumps(family)) < before + 1000  # generators of the spaces, which batching makes
        assert not cloudpickle.loads(cloudpickle.dumps(family))._kept.idle

    def test_an_environment_that_raised_is_not_used_again(self, module: Callable[[str], str]) -> None:
        source = LINE.replace(
            "self.position += action", "self.position += action / self.goal[0] ** 0 + 0 * self.check()"
        )
        source += "    def check(self):\n        if self.goal[0] > 5: raise OSError('fell over')\n        return 0\n"
        family: Any = from_name(f"{module(source)}:Line")
        healthy, faulty = {"goal": [1.0]}, {"goal": [6.0]}
        family.make_vector_env([healthy], 2).close()
        record = rollouts(family, [faulty, healthy])
        assert len(record.errors) == 2
        assert "fell over" in record.errors[0]
        assert record.valid.any((1, 2)).tolist() == [False, True]
        assert sum(map(len, family._kept.idle.values())) == 2
        assert_same(rollouts(family, [healthy]), rollouts(from_name(family.name), [healthy]))

    def test_an_environment_that_remembers_is_made_anew(self, module: Callable[[str], str]) -> None:
        """It starts every episode farther away: kept, it would play otherwise in the next batch."""
        source = LINE.replace("horizon = 12", "horizon = 12\n    episodes = 0")
        source = source.replace("super().reset(seed=seed)", "super().reset(seed=seed); self.episodes += 1")
        source = source.replace("normal(size=1)", "normal(size=1) + self.episodes")
        family: Any = from_name(f"{module(source)}:Line")
        tasks = draw(family, 2)
        np.testing.assert_array_equal(play(family, tasks), play(family, tasks))
        assert not family._kept.idle

    def test_an_environment_that_cannot_be_repeated_is_named(self, module: Callable[[str], str]) -> None:
        source = LINE.replace("self.position = self.np_random", "self.position = np.random.default_rng()")
        family = from_name(f"{module(source)}:Line")
        with pytest.warns(UserWarning, match="Line plays differently with the same task, seed and actions"):
            family.make_vector_env(draw(family, 1), 1)


class TestRollouts:
    def test_are_valid_and_do_not_depend_on_the_company(self, family: TaskDistribution) -> None:
        tasks = draw(family, 3)
        record = rollouts(family, tasks)
        assert not record.errors
        assert record.tasks == tuple(tasks)
        assert record.kept().all()
        lengths = record.valid.sum(1)
        assert lengths.min() >= 1
        assert lengths.max() <= family.horizon
        assert (record.terminated.any(1) | (lengths == family.horizon)).all()
        assert np.isfinite(record.returns()).all()
        assert_same(rollouts(family, tasks), record)
        alone = rollouts(family, tasks[2:], first=2)
        np.testing.assert_array_equal(alone.returns()[0], record.returns()[2])
        np.testing.assert_array_equal(alone.last_observations[0], record.last_observations[2])

    def test_the_random_player_is_measured_once_and_the_same_everywhere(
        self, family: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adapter, "REFERENCE_EPISODES", 20)
        play(family, draw(family, 2))
        other = cloudpickle.loads(cloudpickle.dumps(family))
        reference = family.reference
        assert other.reference == reference
        assert family.reference is reference
        assert cloudpickle.loads(cloudpickle.dumps(family)).__dict__["reference"] == reference
        assert reference.oracle is None
        assert np.isfinite([reference.random, reference.random_sd]).all()

    def test_the_random_player_of_cartpole(self) -> None:
        """Known to get 22 of 500, with a standard deviation of 12."""
        reference = from_name("gym:CartPole-v1").reference
        assert 17 < reference.random < 28
        assert 6 < reference.random_sd < 20

    @pytest.mark.parametrize("ends", [False, True])
    @pytest.mark.parametrize(
        "said",
        [
            "'success': distance < 0.3",
            "'is_success': np.float64(distance < 0.3)",
            "'success': np.bool_(distance < 0.3)",
        ],
    )
    def test_successes_are_those_of_the_infos(self, module: Callable[[str], str], said: str, ends: bool) -> None:
        """Also in the step that ends an episode, and not of the next one's start."""
        source = LINE.replace('"distance": distance', said).replace(
            "distance < 0.1, False", f"distance < 0.3 and {ends}, False"
        )
        family = from_name(f"{module(source)}:Line")
        record = rollouts(family, draw(family, 3), trial_episodes=2)
        assert record.successes is not None
        assert record.successes.any()
        assert not record.successes.all()
        number = record.starts.cumsum(1)
        for episode in (1, 2):
            near = (record.rewards > -0.3) & record.valid & (number == episode)
            np.testing.assert_array_equal(record.successes[..., episode - 1], near.any(1))

    def test_words_are_no_success(self, module: Callable[[str], str]) -> None:
        source = LINE.replace('"distance": distance', '"success": "no"')
        family = from_name(f"{module(source)}:Line")
        assert rollouts(family, draw(family, 2)).successes is None
