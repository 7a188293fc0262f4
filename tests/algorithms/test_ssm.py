"""One block: sequence against steps, resets, stability, per-task parameters, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from builders import seeds
from ssm_metarl.algorithms import slot_memory
from ssm_metarl.algorithms.ssm import SSMBlock

FORMS = pytest.mark.parametrize(("gated", "slots"), [(False, 0), (True, 0), (False, 3), (True, 3)])


EXTREMES = (-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4)


def make_block(
    seed: int, hidden: int = 3, state: int = 4, gated: bool = False, slots: int = 0, dtype: Any = torch.float32
) -> SSMBlock:
    generator = torch.Generator().manual_seed(seed)
    block = SSMBlock(hidden, state, gated, generator, slots=slots)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return block.to(dtype)


def draw(seed: int, *shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some_state(block: SSMBlock, seed: int, *lead: int, dtype: Any = torch.float32) -> list[Any]:
    """As after some steps: the weights of a memory are not negative."""
    sizes = [(len(block.nu), 2)]
    if block.memory is not None:
        sizes.append((block.memory.address.shape[-1], len(block.D) + 2))
    return [draw(seed + i, *lead, *size, dtype=dtype).abs() for i, size in enumerate(sizes)]


def empty_state(block: SSMBlock, *lead: int) -> list[Any]:
    return [torch.zeros_like(each) for each in some_state(block, 0, *lead)]


def stepwise(block: SSMBlock, sequence: Any, resets: Any, state: Any) -> tuple[Any, Any]:
    """The sequence a step at a time, with the state zeroed where it is reset."""
    outputs = []
    for x, reset in zip(sequence.unbind(-3), resets.unbind(-2), strict=True):
        state = [torch.where(reset[..., None, None], 0.0, each) for each in state]
        y, state = block(x.unsqueeze(-3), None, state)
        outputs.append(y)
    return torch.cat(outputs, -3), state


def moduli(block: SSMBlock) -> Any:
    """|a|, seen from outside: what is left after a step of a state of 1 when nothing comes in."""
    state = torch.zeros(1, len(block.nu), 2)
    state[..., 0] = 1.0
    return block(torch.zeros(1, 1, len(block.D)), None, [state])[1][0].norm(dim=-1)


blocks = st.builds(
    make_block, seeds, st.integers(1, 5), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([0, 3])
)


@settings(max_examples=40)
@given(
    block=blocks,
    seed=seeds,
    lead=st.sampled_from([(), (2,)]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_sequence_splits_and_steps_agree(block: Any, seed: int, lead: Any, lengths: Any, density: float) -> None:
    """Whole, cut anywhere and step by step; values and gradients."""
    steps, num_episodes = sum(lengths), 3
    sequence = draw(seed, *lead, steps, num_episodes, len(block.D))
    resets = torch.rand(*lead, steps, num_episodes, generator=torch.Generator().manual_seed(seed + 1)) < density
    state = some_state(block, seed + 2, *lead, num_episodes)
    whole, end = block(sequence, resets, state)
    stepped, stepped_end = stepwise(block, sequence, resets, state)
    pieces, carried = [], state
    for x, reset in zip(sequence.split(lengths, -3), resets.split(lengths, -2), strict=True):
        y, carried = block(x, reset if reset.any() else None, carried)
        pieces.append(y)
    weight = draw(seed + 3, *whole.shape)
    gradients = [
        torch.autograd.grad(
            (weight * y).sum() + sum(each.square().sum() for each in h), list(block.parameters()), retain_graph=True
        )
        for y, h in ((whole, end), (stepped, stepped_end), (torch.cat(pieces, -3), carried))
    ]
    for y, h in ((stepped, stepped_end), (torch.cat(pieces, -3), carried)):
        torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5)
        for one, other in zip(h, end, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@settings(max_examples=20)
@given(block=blocks, seed=seeds, at=st.integers(0, 5))
def test_a_reset_is_a_new_start(block: Any, seed: int, at: int) -> None:
    sequence, state = draw(seed, 6, 2, len(block.D)), some_state(block, seed + 1, 2)
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[at, 0] = True
    output, end = block(sequence, resets, state)
    before, _ = block(sequence, None, state)
    after, after_end = block(sequence[at:])
    torch.testing.assert_close(output[:at], before[:at])
    torch.testing.assert_close(output[at:, 0], after[:, 0], rtol=1e-5, atol=1e-5)
    for one, other in zip(end, after_end, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[:, 1], before[:, 1])


@FORMS
def test_slots_tasks_and_time_are_apart(gated: bool, slots: int) -> None:
    """A number that is not one spoils its own task, slot and future, nothing else.

    A memory's products of matrices multiply it by 0 for the past, too, of the same slot.
    """
    block, sequence = make_block(0, gated=gated, slots=slots), draw(1, 2, 5, 3, 3)
    resets = torch.zeros(2, 5, 3, dtype=torch.bool)
    resets[:, 2, 1] = True
    clean, clean_end = block(sequence, resets)
    sequence[1, 3, 2] = float("nan")
    output, end = block(sequence, resets)
    spoiled = torch.zeros(2, 5, 3, dtype=torch.bool)
    spoiled[1, 0 if slots else 3 :, 2] = True
    assert output.isnan().any(-1).equal(spoiled)
    torch.testing.assert_close(output[~spoiled], clean[~spoiled])
    for one, other in zip(end, clean_end, strict=True):
        assert one.isnan().any(-1).any(-1).equal(spoiled[:, -1])
        torch.testing.assert_close(one[~spoiled[:, -1]], other[~spoiled[:, -1]])


@pytest.mark.parametrize("gated", [False, True])
def test_every_mode_is_stable_at_any_parameter(gated: bool) -> None:
    block = make_block(0, state=2 * len(EXTREMES), gated=gated)
    with torch.no_grad():
        block.nu.copy_(torch.tensor(EXTREMES))
        block.theta.copy_(torch.tensor(EXTREMES).flip(0))
    assert (moduli(block) < 1).all()
    output, end = block(draw(0, 300, 2, 3))
    assert output.isfinite().all()
    assert end[0].isfinite().all()
    gradients = torch.autograd.grad(output.square().sum(), list(block.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("learning_rate", [0.3, 10.0])
def test_every_mode_is_stable_after_any_update(sign: float, learning_rate: float) -> None:
    """Whether an optimiser makes the state as small or as large as it can."""
    block, sequence = make_block(3, state=8), draw(0, 20, 2, 3)
    optimizer = torch.optim.Adam([block.nu, block.theta], learning_rate)
    for _ in range(60):
        optimizer.zero_grad()
        (sign * block(sequence)[1][0].square().sum()).backward()
        optimizer.step()
        assert (moduli(block) < 1).all()


@settings(max_examples=20)
@given(block=blocks, seed=seeds, tasks=st.integers(1, 3), with_state=st.booleans())
def test_parameters_of_each_task_equal_a_loop_over_tasks(block: Any, seed: int, tasks: int, with_state: bool) -> None:
    """Values and gradients."""
    parameters = {
        name: (value + 0.3 * draw(seed + i, tasks, *value.shape)).detach().requires_grad_()
        for i, (name, value) in enumerate(block.named_parameters())
    }
    sequence = draw(seed, tasks, 4, 3, len(block.D))
    resets = draw(seed + 1, tasks, 4, 3) > 1.0
    state = some_state(block, seed + 2, tasks, 3) if with_state else None
    output, end = functional_call(block, parameters, (sequence, resets, state))
    gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    for task in range(tasks):
        own = {name: value[task] for name, value in parameters.items()}
        alone, alone_end = functional_call(
            block, own, (sequence[task], resets[task], None if state is None else [each[task] for each in state])
        )
        torch.testing.assert_close(output[task], alone, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(end, alone_end, strict=True):
            torch.testing.assert_close(ours[task], theirs, rtol=1e-5, atol=1e-5)
        own_gradients = torch.autograd.grad(alone.square().sum(), list(own.values()))
        for together, single in zip(gradients, own_gradients, strict=True):
            torch.testing.assert_close(together[task], single, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for name, value in block.named_parameters():
            value.copy_(parameters[name][0])
    same = {name: value.detach()[:1].expand_as(value) for name, value in parameters.items()}
    torch.testing.assert_close(functional_call(block, same, (sequence,))[0], block(sequence)[0], rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "resets-and-state"])
def test_first_and_second_derivatives(
    gated: bool, slots: int, tasks: int | None, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With respect to the sequence, the state and every parameter, shared or of each task."""
    monkeypatch.setattr(slot_memory, "CHUNK", 2)
    lead = () if tasks is None else (tasks,)
    block = make_block(0, 2, 4, gated, slots, torch.float64)
    names = [name for name, _ in block.named_parameters()]
    values = [
        (value.expand(*lead, *value.shape) + 0.1 * draw(i, *lead, *value.shape, dtype=torch.float64))
        .detach()
        .requires_grad_()
        for i, value in enumerate(block.parameters())
    ]
    sequence = draw(1, *lead, 3, 2, 2, dtype=torch.float64).requires_grad_()
    state = [each.requires_grad_() for each in some_state(block, 2, *lead, 2, dtype=torch.float64)] if full else []
    resets = torch.tensor([[False, False], [True, False], [False, False]]).expand(*lead, 3, 2) if full else None

    def function(*inputs: Any) -> Any:
        sequence, *state = inputs[len(names) :]
        parameters = dict(zip(names, inputs, strict=False))
        output, after = functional_call(block, parameters, (sequence, resets, state or None))
        return output, *after

    assert gradcheck(function, (*values, sequence, *state))
    # By random projections: the whole second derivative is large.
    assert gradgradcheck(function, (*values, sequence, *state), fast_mode=True)


def test_modes_start_spread_over_the_time_scales_of_a_trial() -> None:
    reach = moduli(SSMBlock(3, 16, False, torch.Generator().manual_seed(0))).detach().sort().values[0]
    assert reach[-1] == pytest.approx(0.999, abs=1e-4)
    assert reach[0] < 0.5


@pytest.mark.parametrize("period", [2.0, 20.0, 1000.0])
def test_modes_start_with_periods_of_at_least_that_asked_for(period: float) -> None:
    theta = SSMBlock(3, 2000, False, torch.Generator().manual_seed(0), period).theta.detach()
    shares = theta * period / (2 * torch.pi)
    assert 0 <= shares.min() <= 0.01
    assert shares.median().item() == pytest.approx(0.5, abs=0.05)
    assert 0.99 <= shares.max() <= 1


@pytest.mark.parametrize("nu", [-6.9, -3.0, 0.0])
def test_modes_have_one_output_variance_for_white_input(nu: float) -> None:
    """γ = sqrt(1 - |a|²): the state's variance does not depend on the memory's length."""
    block = make_block(0, 1, 2)
    with torch.no_grad():
        block.nu.fill_(nu)
        block.B.copy_(torch.tensor([[1.0, 0.0]]))
    # Each slot's state after long has the stationary distribution.
    _, (state,) = block(draw(0, 4000, 500, 1))
    assert state.square().sum(-1).mean().item() == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("lead", [(), (3,)])
@FORMS
def test_gradients_of_long_sequences_equal_those_with_a_graph(
    gated: bool, slots: int, lead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a graph the gradients are made piece by piece, with one all at once."""
    monkeypatch.setattr(slot_memory, "CHUNK", 20)
    block = make_block(0, gated=gated, slots=slots, dtype=torch.float64)
    values = {name: value.expand(*lead, *value.shape).clone() for name, value in block.named_parameters()}
    sequence = draw(1, *lead, 50, 130, 3, dtype=torch.float64).requires_grad_()
    resets = draw(2, *lead, 50, 130) > 1
    above = draw(3, *sequence.shape, dtype=torch.float64)
    output = functional_call(block, values, (sequence, resets))[0]
    wanted = [sequence, *(value for value in values.values())]
    for value in values.values():
        assert value.requires_grad
    in_pieces = torch.autograd.grad(output, wanted, above, retain_graph=True)
    at_once = torch.autograd.grad(output, wanted, above, create_graph=True)
    for piece, whole in zip(in_pieces, at_once, strict=True):
        torch.testing.assert_close(piece, whole)
