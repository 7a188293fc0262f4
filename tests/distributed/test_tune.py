"""`MetaTrainer` in Ray Tune: its numbers are metrics, and Tune's searchers and schedulers work with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search.optuna import OptunaSearch

from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.metrics import log_line
from ssm_metarl.distributed.trainer import MetaTrainer


def base(**options: Any) -> dict[str, Any]:
    small = {"hidden_dim": 8, "state_dim": 4, "meta_batch": 4, "episodes": 2, "num_workers": 0, "learner_threads": 1}
    return TrainConfig.for_task("navigation-2d", **{**small, **options}).to_dict()


def test_metrics_are_numbers_by_name_with_lists_beneath() -> None:
    trainer = MetaTrainer(base(inner_steps=2))
    metrics = trainer.step()
    trainer.stop()
    lists = [name for name, value in metrics.items() if not isinstance(value, int | float | Mapping)]
    assert lists == []
    returns = metrics["details"]["return_by_step"]
    assert [metrics[f"return_step_{step}"] for step in range(3)] == returns
    assert metrics["return_before"] == returns[0]
    assert metrics["return_after"] == metrics["episode_return_mean"] == returns[2]
    lengths = metrics["details"]["episode_length_by_step"]
    assert [metrics[f"episode_length_step_{step}"] for step in range(3)] == lengths
    assert metrics["env_steps"] == pytest.approx(4 * 2 * sum(lengths)), "of four tasks with two episodes at each stage"
    assert {"sample", "adapt", "update", "ray", "total"} <= metrics["seconds"].keys()
    line = log_line(metrics)
    assert line["return_by_step"] == returns
    assert not {"return_after", "return_step_0", "details"} & set(line)
    json.dumps(line)


def fit(tmp_path: Path, space: Mapping[str, Any], **options: Any) -> tune.ResultGrid:
    return tune.Tuner(
        MetaTrainer,
        param_space={**base(), **space},
        tune_config=tune.TuneConfig(metric="return_after", mode="max", **options),
        run_config=tune.RunConfig(name="tuned", storage_path=str(tmp_path), stop={"training_iteration": 4}, verbose=0),
    ).fit()


RATES = {"outer_lr": tune.loguniform(1e-4, 1e-2)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["grid", "asha", "optuna", "pbt", "pb2"])
def test_tunes_own_searchers_and_schedulers_find_a_configuration(tmp_path: Path, name: str) -> None:
    often = {"time_attr": "training_iteration", "perturbation_interval": 2}
    space, options = {
        "grid": ({"outer_lr": tune.grid_search([1e-3, 1e-2])}, {}),
        "asha": (RATES, {"num_samples": 3, "scheduler": ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2)}),
        "optuna": (RATES, {"num_samples": 3, "search_alg": OptunaSearch(seed=0)}),
        "pbt": (RATES, {"num_samples": 2, "scheduler": PopulationBasedTraining(hyperparam_mutations=RATES, **often)}),
        "pb2": (RATES, {"num_samples": 2, "scheduler": PB2(hyperparam_bounds={"outer_lr": [1e-4, 1e-2]}, **often)}),
    }[name]
    results = fit(tmp_path, space, **options)
    assert not results.errors
    assert len(results) == options.get("num_samples", 2)
    best = results.get_best_result()
    assert best.metrics is not None
    assert math.isfinite(best.metrics["return_after"])
    assert {"return_before", "return_step_0", "return_step_1", "episode_return_mean"} <= best.metrics.keys()
    assert best.metrics["env_steps"] > best.metrics["training_iteration"]
    assert best.metrics["seconds"]["total"] > 0
    assert best.config is not None
    assert 1e-4 <= best.config["outer_lr"] <= 1e-2
    done = {result.metrics["training_iteration"] for result in results if result.metrics}
    assert max(done) == 4
