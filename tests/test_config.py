"""The options of a run: nested to read, on one level to write."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from ssm_metarl.config import OPTIONS, PARTS, MachineConfig, TrainConfig

CHANGES: dict[str, Any] = {"task": "bandit", "task_options": {"arms": 3}, "hidden_dim": 8, "step_weights": [0.5, 1.0]}
CHANGES |= {"iterations": 3, "device": "cuda", "sample_timeout_s": 2.5}
"""Options of every part."""


def test_no_name_is_in_two_parts() -> None:
    names = [f.name for part in PARTS.values() for f in fields(part)]
    names += [f.name for f in fields(TrainConfig) if f.name not in PARTS]
    assert len(set(names)) == len(names) == len(OPTIONS)
    assert set(PARTS) == {"policy", "meta", "experience", "machine"}
    assert not set(PARTS).intersection(OPTIONS)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig.for_task("cartpole"), TrainConfig().replace(**CHANGES)])
def test_one_level_and_parts_are_inverse(config: TrainConfig) -> None:
    flat = config.to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert flat.keys() == OPTIONS.keys()
    assert TrainConfig.from_dict(flat) == config
    for name, part in OPTIONS.items():
        value = getattr(getattr(config, part), name) if part else getattr(config, name)
        assert flat[name] == (list(value) if isinstance(value, tuple) else value)


def test_replacing_reaches_every_part_and_leaves_the_rest() -> None:
    before = TrainConfig.for_task("cartpole", num_workers=2)
    after = before.replace(**CHANGES)
    assert after.to_dict() == {**before.to_dict(), **CHANGES}
    assert (after.machine.device, after.machine.num_workers, after.meta.step_weights) == ("cuda", 2, (0.5, 1.0))
    assert before == TrainConfig.for_task("cartpole", num_workers=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"iner_lr": 1}, "Unknown option key 'iner_lr': did you mean 'inner_lr'"),
        ({"policy": {}}, "Unknown option key 'policy'"),
        ({"num_workers": -1}, "num_workers must be an integer of 0 or more"),
        ({"algorithm": "policy-gradient"}, "inner_steps must be 0 for policy-gradient"),
    ],
)
def test_an_impossible_change_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig().replace(**changes)


def test_a_part_checks_itself() -> None:
    with pytest.raises(ValueError, match="learner_threads must be"):
        MachineConfig(learner_threads=0)
