"""Whether algorithms/functions.py earns its lines: meta-updates with its derivatives, with torch's own, and with half.

Four variants: `own` has all of it; `torch` has torch's operations and autograd's derivatives; `linear` has our
linear maps alone, `elementwise` our element-wise ends of blocks alone. Each (variant, case) is a process of its own,
so that its peak memory is its own; variants take turns.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded; the learner's threads are its own

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from _report import log, report
from torch import Tensor

from ssm_metarl.algorithms import policy, ssm
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed.trainer import MetaTrainer

Variant = Literal["own", "torch", "linear", "elementwise"]
VARIANTS: tuple[Variant, ...] = ("own", "torch", "linear", "elementwise")

COMMON: Mapping[str, Any] = {
    "algorithm": "promp", "meta_batch": 20, "episodes": 20, "inner_steps": 1, "epochs": 5, "inner_lr": 0.01,
    "step_weights": (),
}  # fmt: skip
CASES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "one block": {"num_layers": 1, "state_dim": 32},
    "gated": {"num_layers": 1, "state_dim": 32, "gated": True},
    "width 128": {"hidden_dim": 128},
    "two inner steps": {"inner_steps": 2},
}
"""Of navigation-2d: what differs from its default policy, which has two ungated blocks of width 64."""


@dataclass(frozen=True)
class Options:
    """Compare the operations with torch's.

    Attributes:
        rounds: measured turns of every variant.
        iterations: of a turn, after one that is not measured.
        threads: of the learner.
        variant: measure this one in this process; None: all, each in its own.
        case: measured; None: all.
    """

    rounds: int = 2
    iterations: int = 5
    threads: tuple[int, ...] = (1, 2)
    variant: Variant | None = None
    case: str | None = None


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """As `functions.linear`."""
    rows = x.reshape(*weight.shape[:-2], -1, x.shape[-1])
    if bias is None:
        y = rows @ weight
    else:
        y = torch.baddbmm(bias.unsqueeze(-2), rows, weight) if weight.dim() == 3 else torch.addmm(bias, rows, weight)
    y = y.reshape(*x.shape[:-1], weight.shape[-1])
    return y if residual is None else y + residual


def _beside(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(*vector.shape[:-1], *(1,) * (x.dim() - vector.dim()), vector.shape[-1])


def torch_skip_tanh(y: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """As `functions.skip_tanh`."""
    return torch.tanh(y + _beside(skip, x) * x)


def torch_gated_residual(y: Tensor, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `functions.gated_residual`."""
    return x + (y + _beside(skip, x) * x) * torch.sigmoid(_beside(weight, x) * x + _beside(bias, x))


def put_in_place(variant: Variant) -> None:
    """Have the policy use a variant's operations."""
    if variant in ("torch", "elementwise"):
        policy.linear = ssm.linear = torch_linear  # type: ignore[assignment]
    if variant in ("torch", "linear"):
        policy.tanh = torch.tanh  # type: ignore[assignment]
        ssm.skip_tanh, ssm.gated_residual = torch_skip_tanh, torch_gated_residual


def measure(variant: Variant, case: str, threads: int, iterations: int) -> dict[str, float]:
    """Seconds of adaptation and meta-update together, and the process's peak memory."""
    put_in_place(variant)
    torch.set_num_threads(1)
    trainer = MetaTrainer(
        TrainConfig.for_task("navigation-2d", **{**COMMON, **CASES[case], "learner_threads": threads}).to_dict()
    )
    initial = trainer.learner.weights()
    wall, cpu = [], []
    for turn in range(1 + iterations):
        trainer.learner.load(initial, {})
        begin = time.process_time()
        seconds = trainer.step()["seconds"]
        if turn:
            wall.append(seconds["adapt"] + seconds["update"])
            cpu.append(time.process_time() - begin - seconds["sample"])
    trainer.stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), "peak_mib": peak}


def main(options: Options) -> None:
    if options.variant and options.case:
        (threads,) = options.threads
        print(json.dumps(measure(options.variant, options.case, threads, options.iterations)))
        return
    results = []
    for case in [options.case] if options.case else CASES:
        for threads in options.threads:
            found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
            for _ in range(options.rounds):
                for variant in VARIANTS:
                    words = [f"--variant={variant}", f"--case={case}", "--threads", str(threads)]
                    words += [f"--iterations={options.iterations}"]
                    done = subprocess.run(
                        [sys.executable, __file__, *words], capture_output=True, text=True, check=True
                    )
                    found[variant].append(json.loads(done.stdout))
                    log(f"{case}, {threads} threads, {variant}: {found[variant][-1]}")
            figures = {
                variant: {key: min(one[key] for one in runs) for key in runs[0]} for variant, runs in found.items()
            }
            results.append({"case": case, "threads": threads, **figures})
    report("operations", {**table(results), "rounds": options.rounds, "iterations": options.iterations})


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and peak memory by case and variant."""
    kinds = {"s": "seconds", "MiB": "peak_mib"}
    return {
        "title": "Operations with derivatives of their own",
        "columns": [f"{variant}, {unit}" for unit in kinds for variant in VARIANTS],
        "rows": [
            {
                "name": f"{found['case']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}",
                "cells": [found[variant][key] for key in kinds.values() for variant in VARIANTS],
            }
            for found in results
        ],
        "notes": ["Adaptation and meta-update of `navigation-2d`, median of a run's iterations, least of the rounds."],
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
