"""One full gated SSM block against one nn.LSTM and one nn.GRU layer of equal width, on one thread.

How many times faster the block is (above 1: faster), by key:

    forward_backward_vs_lstm, …_vs_gru       gradient to input and parameters, 100 steps of 400 sequences
    long_forward_backward_vs_lstm, …_vs_gru  the same, 1000 steps of 20 sequences
    slots_vs_lstm, …_vs_gru, long_slots_…    the block with 16 memory slots instead
    scan_vs_lstm, scan_vs_gru, long_scan_…   the bare recurrence instead of the block
    second_order_vs_gru                      MAML's meta-gradient over 20 tasks of 20 episodes of 100 steps
    second_order_vs_batched_gru              the same, against a GRU written by hand for weights a task
    gradient_norm_second_order_vs_gru        gradient of the gradient's squared norm, 100 steps of 400

With `--device cuda`, forward and backward alone, of thousands of sequences against cuDNN's layers.

In the meta-gradient the block runs tasks batched along their axis, in shards, as the learner does; nn.GRU
counts with the faster of a loop over tasks and torch.func.vmap, where that works.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import tyro
from _report import log, report, timings
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ssm_metarl.algorithms.inner_loop import Parameters, for_tasks
from ssm_metarl.algorithms.scan import scan
from ssm_metarl.algorithms.ssm import SSMBlock

WIDTH = 64  # of all layers; the block's state has as many real variables
SHAPES = {"": (100, 400), "long_": (1000, 20)}  # steps, sequences
TASKS, STEPS, EPISODES = 20, 100, 20
SHARD = 10  # tasks: what maml.task_shards makes of batches of this size
INNER_LR = 0.1

Seconds = dict[str, dict[str, float]]
Way = Callable[[], tuple[Tensor, ...]]
Losses = Callable[[Parameters, Tensor], Tensor]
"""Parameters with a task axis [M, ...] and input [M, T, K, H] → each task's mean squared output, [M]."""


@dataclass(frozen=True)
class Options:
    """Compare the SSM block with nn.LSTM and nn.GRU.

    Attributes:
        repetitions: measured turns.
        device: another than the CPU, such as "cuda", on which `sequences` are compared and nothing else.
        sequences: there, how many at once.
    """

    repetitions: int = 7
    device: str = "cpu"
    sequences: tuple[int, ...] = (1024, 4096, 16384, 65536)


def forward_backward(layer: nn.Module, steps: int, sequences: int) -> Callable[[], object]:
    """Output and gradients of a layer within a stack: its input has a gradient too."""
    x = torch.randn(steps, sequences, WIDTH, requires_grad=True)
    above = torch.randn(steps, sequences, WIDTH)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x)[0], wanted, above)


def bare_scan(steps: int, sequences: int) -> Callable[[], object]:
    """The recurrence alone, of WIDTH real state variables."""
    a = torch.polar(torch.full((WIDTH // 2,), 0.99), torch.rand(WIDTH // 2)).requires_grad_()
    b = torch.randn(steps, sequences, WIDTH // 2, dtype=torch.complex64, requires_grad=True)
    above = torch.randn(steps, sequences, WIDTH // 2, dtype=torch.complex64)
    return lambda: torch.autograd.grad(scan(a, b), [a, b], above)


def gradient_norm(layer: nn.Module, steps: int, sequences: int) -> Callable[[], object]:
    """Gradient, to input and parameters, of the squared norm of the loss's gradient to the parameters."""
    x = torch.randn(steps, sequences, WIDTH, requires_grad=True)
    parameters = list(layer.parameters())

    def work() -> object:
        loss = layer(x)[0].square().mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        return torch.autograd.grad(norm, [x, *parameters])

    return work


def meta_gradient(losses: Losses, shared: Parameters, support: Tensor, query: Tensor, shard: int) -> tuple[Tensor, ...]:
    """MAML's second-order gradient: of the mean query loss after one inner step, to the initial weights.

    Args:
        losses: of the tasks.
        shared: initial weights.
        support, query: [M, T, K, H] each.
        shard: tasks that are differentiated together.
    """
    total = [torch.zeros_like(value) for value in shared.values()]
    for start in range(0, len(support), shard):
        part = slice(start, start + shard)
        own = for_tasks(shared, len(support[part]))
        inner = torch.autograd.grad(losses(own, support[part]).sum(), list(own.values()), create_graph=True)
        adapted = {name: value - INNER_LR * g for (name, value), g in zip(own.items(), inner, strict=True)}
        loss = losses(adapted, query[part]).sum() / len(support)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, list(shared.values())), strict=True):
            sum_ += gradient
    return tuple(total)


def mean_squares(outputs: Tensor) -> Tensor:
    """[M, T, K, H] → [M]."""
    return outputs.square().mean((1, 2, 3))


def block_losses(block: SSMBlock) -> Losses:
    """Parameters with a task axis are what the block is made for."""
    return lambda parameters, x: mean_squares(functional_call(block, parameters, (x,))[0])


def looped_losses(gru: nn.GRU) -> Losses:
    """One call of nn.GRU a task."""

    def losses(parameters: Parameters, x: Tensor) -> Tensor:
        own = [{name: value[i] for name, value in parameters.items()} for i in range(len(x))]
        return mean_squares(torch.stack([functional_call(gru, p, (x[i],))[0] for i, p in enumerate(own)]))

    return losses


def vmapped_losses(gru: nn.GRU) -> Losses:
    """nn.GRU under torch.func.vmap."""
    outputs = vmap(lambda parameters, x: functional_call(gru, parameters, (x,))[0])
    return lambda parameters, x: mean_squares(outputs(parameters, x))


def batched_losses(parameters: Parameters, x: Tensor) -> Tensor:
    """nn.GRU's equations with a task axis, a batched matrix product each step."""
    tasks, steps, episodes, _ = x.shape
    weight, bias = parameters["weight_ih_l0"].mT, parameters["bias_ih_l0"].unsqueeze(1)
    driven = torch.baddbmm(bias, x.flatten(1, 2), weight).unflatten(1, (steps, episodes))
    weight, bias = parameters["weight_hh_l0"].mT, parameters["bias_hh_l0"].unsqueeze(1)
    h = x.new_zeros(tasks, episodes, WIDTH)
    outputs = []
    for entering in driven.unbind(1):
        reset, update, new = entering.chunk(3, -1)
        reset_h, update_h, new_h = torch.baddbmm(bias, h, weight).chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        h = torch.lerp(new, h, torch.sigmoid(update + update_h))
        outputs.append(h)
    return mean_squares(torch.stack(outputs, 1))


def meta_gradients(block: SSMBlock, gru: nn.GRU) -> tuple[dict[str, Way], str | None]:
    """The ways to the meta-gradient, by name, and why vmap over nn.GRU is not among them (None: it is)."""
    support, query = torch.randn(2, TASKS, STEPS, EPISODES, WIDTH)

    def way(losses: Losses, layer: nn.Module, shard: int) -> Way:
        shared: Parameters = dict(layer.named_parameters())
        return lambda: meta_gradient(losses, shared, support, query, shard)

    ways = {
        "ssm": way(block_losses(block), block, SHARD),
        "ssm_unsharded": way(block_losses(block), block, TASKS),
        "gru_loop": way(looped_losses(gru), gru, 1),
        "gru_vmap": way(vmapped_losses(gru), gru, TASKS),
        "batched_gru": way(batched_losses, gru, SHARD),
        "batched_gru_unsharded": way(batched_losses, gru, TASKS),
    }
    failure = None
    try:
        ways["gru_vmap"]()
    except RuntimeError as error:
        failure = str(error)
        log(f"torch.func.vmap over nn.GRU does not work: {failure}")
        del ways["gru_vmap"]
    for kind in ("ssm", "gru"):
        same_gradients(way() for name, way in ways.items() if kind in name)
    return ways, failure


def same_gradients(results: Iterable[tuple[Tensor, ...]]) -> None:
    """Refuse to compare ways that compute different things."""
    first, *others = results
    for other in others:
        for one, two in zip(first, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def fastest(times: Seconds, prefix: str) -> str:
    """The name with `prefix` whose median is the least."""
    return min((name for name in times if name.startswith(prefix)), key=lambda name: times[name]["median"])


def on_device(options: Options) -> None:
    """Compare layers on a device, by the number of sequences."""
    device = torch.device(options.device)
    layers: dict[str, nn.Module] = {
        "block": SSMBlock(WIDTH, WIDTH, True, torch.Generator().manual_seed(0)),
        "block with 16 slots": SSMBlock(WIDTH, WIDTH, True, torch.Generator().manual_seed(0), slots=16),
        "nn.LSTM": nn.LSTM(WIDTH, WIDTH),
        "nn.GRU": nn.GRU(WIDTH, WIDTH),
    }
    steps, _ = SHAPES[""]

    def finished(layer: nn.Module, sequences: int) -> Callable[[], object]:
        with device:
            work = forward_backward(layer.to(device), steps, sequences)

        def until_done() -> None:
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        return until_done

    rows = []
    for sequences in options.sequences:
        log(f"{sequences} sequences …")
        times = timings({name: finished(layer, sequences) for name, layer in layers.items()}, options.repetitions)
        cells = [1000 * times[name]["median"] for name in layers]
        rows.append({"name": f"{sequences:,} sequences", "cells": [*cells, *(peer / cells[0] for peer in cells[2:])]})
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    table = {
        "title": f"A block and cuDNN's layers on {card}",
        "columns": [*(f"{name}, ms" for name in layers), "nn.LSTM by block", "nn.GRU by block"],
        "rows": rows,
        "notes": [f"Forward and backward of {steps} steps, width and state {WIDTH}."],
    }
    report("ssm-device", table)


def main(options: Options) -> None:
    if options.device != "cpu":
        return on_device(options)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = SSMBlock(WIDTH, WIDTH, True, torch.Generator().manual_seed(0))
    slots = SSMBlock(WIDTH, WIDTH, True, torch.Generator().manual_seed(0), slots=16)
    lstm, gru = nn.LSTM(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH)
    ratios: dict[str, float] = {}
    seconds: dict[str, Seconds] = {}

    for prefix, shape in SHAPES.items():
        log(f"forward and backward, {shape[0]} steps of {shape[1]} sequences …")
        layers = {"ssm": block, "slots": slots, "lstm": lstm, "gru": gru}
        works = {name: forward_backward(layer, *shape) for name, layer in layers.items()}
        times = timings({**works, "scan": bare_scan(*shape)}, options.repetitions)
        seconds[f"{prefix}forward_backward"] = times
        for peer in ("lstm", "gru"):
            slow = times[peer]["median"]
            ratios[f"{prefix}forward_backward_vs_{peer}"] = slow / times["ssm"]["median"]
            ratios[f"{prefix}slots_vs_{peer}"] = slow / times["slots"]["median"]
            ratios[f"{prefix}scan_vs_{peer}"] = slow / times["scan"]["median"]

    log(f"meta-gradient, {TASKS} tasks of {EPISODES} episodes of {STEPS} steps …")
    ways, failure = meta_gradients(block, gru)
    times = seconds["second_order"] = timings(ways, options.repetitions)
    best, batched = fastest(times, "gru_"), fastest(times, "batched_gru")
    ratios["second_order_vs_gru"] = times[best]["median"] / times["ssm"]["median"]
    ratios["second_order_vs_batched_gru"] = times[batched]["median"] / times["ssm"]["median"]

    log("gradient of the squared gradient norm …")
    norms = {"ssm": gradient_norm(block, *SHAPES[""]), "gru": gradient_norm(gru, *SHAPES[""])}
    times = seconds["gradient_norm_second_order"] = timings(norms, options.repetitions)
    ratios["gradient_norm_second_order_vs_gru"] = times["gru"]["median"] / times["ssm"]["median"]

    facts = {
        "second_order_gru_is": best,
        "second_order_batched_gru_is": batched,
        "gru_vmap_error": failure,
        "width": WIDTH,
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
    }
    report("ssm", {**ratios, **facts, "seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Options))
