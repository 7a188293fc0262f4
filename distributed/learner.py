"""The central learner: meta-parameters, optimiser, adaptation and meta-update."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ssm_metarl.algorithms.batch import Batch, task_shards
from ssm_metarl.algorithms.inner_loop import adapt_weights, batch_for
from ssm_metarl.algorithms.normalizer import Normalizer
from ssm_metarl.algorithms.objective import MetaLoss, meta_loss
from ssm_metarl.algorithms.parameters import is_memory
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import SCHEDULES, MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import MachineConfig

Shard = TypeVar("Shard")
Result = TypeVar("Result")


class Learner:
    """Holds the policy and improves it; the trainer calls it between rollouts:

        weights = learner.weights()
        support = learner.batch(weights, pool.collect(weights, ...))
        adapted = learner.adapt(weights, support)
        query = learner.batch(adapted, pool.collect(adapted, ...))
        statistics = learner.update([support, query], progress=iteration / iterations)

    On a CPU the tasks of a batch are cut into shards, `learner_threads` Python threads work on
    them with one torch thread each (torch releases the interpreter lock), and the shards' gradients are added in
    their order: the result does not depend on the number of threads.

    Args:
        spec: the policy's sizes.
        config: algorithm and learning rates.
        machine: device and threads.
        seed: of the initial weights.
    """

    def __init__(self, spec: PolicySpec, config: MetaConfig, machine: MachineConfig, seed: int) -> None:
        self.config = config
        self.device = torch.device(resolve_device(machine.device))
        self.policy = SSMPolicy(spec, seed).to(self.device)
        self.normalizer = Normalizer(spec, config.discount)
        memory, others = list[Tensor](), list[Tensor]()
        for name, parameter in self.policy.named_parameters():
            (memory if is_memory(name) else others).append(parameter)
        groups = [{"params": others, "share": 1.0}, {"params": memory, "share": config.memory_lr}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=config.outer_lr)
        self._set_rate(config.outer_lr)
        self._threads = 1
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
            self._threads = machine.learner_threads
        # functional_call lends its parameters to the module for the time of the call: a module a thread.
        self._modules: SimpleQueue[SSMPolicy] = SimpleQueue()
        self._lent = [SSMPolicy(spec).to(self.device) for _ in range(self._threads)]
        for module in self._lent:
            self._modules.put(module)

    def observe(self, rollouts: Sequence[Rollouts]) -> None:
        """Take an iteration's rollouts into the running moments, with which the next one is normalised."""
        for each in rollouts:
            self.normalizer.update(each)
        self._normalize(self.normalizer.arrays())

    def _normalize(self, arrays: Mapping[str, Array]) -> None:
        for module in (self.policy, *self._lent):
            for name, buffer in module.named_buffers():
                buffer.copy_(torch.as_tensor(arrays[name]))

    def weights(self) -> dict[str, Array]:
        """Copies of the meta-parameters for workers."""
        return self.policy.numpy_weights()

    def batch(self, weights: Mapping[str, Array], rollouts: Rollouts) -> Batch:
        """Rollouts as the objectives read them, on the learner's device; `weights` (shared, or [M, ...]) acted."""
        return batch_for(self.policy, weights, rollouts, self.config, self._run)

    def adapt(self, weights: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """The tasks' weights [M, ...] after one inner step from `weights` (shared, or [M, ...])."""
        return adapt_weights(self.policy, weights, batch, self.config, self._run)

    def update(
        self, stages: Sequence[Batch], progress: float = 0.0, seed: np.random.SeedSequence | None = None
    ) -> dict[str, float]:
        """One meta-update: `epochs` × `minibatches` Adam steps on the meta-objective over one iteration's rollouts.

        Args:
            stages: S+1 batches, the s-th collected after s inner steps.
            progress: fraction of the run's iterations done, in [0, 1), for the learning-rate schedule.
            seed: of the minibatches' tasks; needed where there are several.

        Returns:
            `loss` (last epoch), `entropy` of the adapted policies and `kl` of the policy before adaptation
            from the one that acted (last epoch), `grad_norm` before clipping (mean), `ratio_error`: largest
            |log ratio| on the first epoch, 0 but for rounding; `learning_rate`; and `shortened_steps`, how often a
            step was cut down that took the policies farther than `max_kl`.

        Raises:
            FloatingPointError: the meta-gradient is not finite; parameters are as before that step.
        """
        config = self.config
        factor = SCHEDULES[config.lr_schedule](progress)
        learning_rate = config.outer_lr * factor
        objective = replace(config, entropy_bonus=config.entropy_bonus * factor)
        self._set_rate(learning_rate)
        # A task that lost all its episodes at some stage has no meta-gradient.
        whole = torch.stack([stage.share.sum((1, 2)) > 0 for stage in stages]).all(0).float()
        assert seed is not None or config.minibatches == 1, "several minibatches need a seed"
        rng = None if config.minibatches == 1 else np.random.default_rng(seed)
        norms, ratio_error = [], 0.0
        references: list[Distribution | None] = []
        step = _Step(self.optimizer)
        for epoch in range(config.passes):
            losses, order = list[MetaLoss](), list[Tensor]()
            for part, complete in self._minibatches(stages, whole, rng):
                results = self._differentiate(objective, part, complete, references)
                # Whoever imitates may go as far as it takes.
                while stages[-1].demonstrated is None and self._too_far(results, complete) and step.shorten():
                    results = self._differentiate(objective, part, complete, references)
                norms.append(self._set_gradients(results))
                if not np.isfinite(norms[-1]):
                    raise FloatingPointError(
                        f"The meta-gradient is not finite in epoch {epoch + 1}; lower inner_lr ({config.inner_lr:g}) "
                        f"or outer_lr ({config.outer_lr:g})."
                    )
                step.take()
                losses += [loss for _, loss in results]
                order.append(complete)
                if len(norms) == 1:
                    ratio_error = max(float(loss.log_ratio) for loss in losses)
            if epoch == 0 and rng is None:
                references = [loss.before for loss in losses]
        counted = torch.cat(order)
        return {
            "loss": float((torch.cat([loss.losses.detach() for loss in losses]) * counted).sum())
            / max(float(counted.sum()), 1.0),
            "entropy": float(np.mean([float(loss.entropy) for loss in losses])),
            "kl": float(torch.cat([loss.kl_before for loss in losses]).mean()),
            "grad_norm": float(np.mean(norms)),
            "ratio_error": ratio_error,
            "learning_rate": learning_rate,
            "shortened_steps": float(step.shortened),
        }

    def _too_far(self, results: Sequence[tuple[object, MetaLoss]], complete: Tensor) -> bool:
        """Whether the adapted policies of the tasks that count are farther from those that acted than they may be."""
        moved = torch.cat([loss.moved for _, loss in results])[complete > 0]
        return bool(self.config.max_kl and len(moved) and not float(moved.mean()) <= self.config.max_kl)

    def _set_gradients(self, results: Sequence[tuple[tuple[Tensor | None, ...], MetaLoss]]) -> float:
        """Add the shards' gradients up for the optimiser; returns their norm, to which at most they are then scaled."""
        parameters = list(self.policy.parameters())
        for index, parameter in enumerate(parameters):
            shares = [gradient for gradients, _ in results if (gradient := gradients[index]) is not None]
            # Without a critic the value head has no part in a policy gradient.
            parameter.grad = torch.stack(shares).sum(0) if shares else None
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _minibatches(
        self, stages: Sequence[Batch], whole: Tensor, rng: np.random.Generator | None
    ) -> Iterator[tuple[Sequence[Batch], Tensor]]:
        """The meta-batch, or (given `rng`) its tasks in random order in parts, with what `whole` says of them."""
        if rng is None:
            yield stages, whole
            return
        for index in np.array_split(rng.permutation(len(whole)), min(self.config.minibatches, len(whole))):
            part = torch.from_numpy(index)
            yield [stage.tasks(part) for stage in stages], whole[part]

    def _differentiate(
        self, config: MetaConfig, stages: Sequence[Batch], complete: Tensor, references: Sequence[Distribution | None]
    ) -> list[tuple[tuple[Tensor | None, ...], MetaLoss]]:
        """The meta-gradient of a minibatch and its diagnostics, shard by shard.

        Args:
            config: of the objective.
            stages: S+1 batches.
            complete: [M], 1 for the tasks that count, 0 for the others.
            references: see `meta_loss`, a shard each; empty: none.
        """
        names, parameters = zip(*self.policy.named_parameters(), strict=True)
        active = max(float(complete.sum()), 1.0)
        shards = task_shards(stages[-1].share.shape)
        parts = [[stage.tasks(shard) for stage in stages] for shard in shards]

        def differentiate(module: SSMPolicy, index: int) -> tuple[tuple[Tensor | None, ...], MetaLoss]:
            shared = dict(zip(names, parameters, strict=True))
            reference = references[index] if references else None
            loss = meta_loss(module, shared, parts[index], config, reference)
            total = (loss.losses * complete[shards[index]]).sum() / active
            return torch.autograd.grad(total, parameters, allow_unused=True), loss

        return self._run(differentiate, range(len(shards)))

    def _run(self, work: Callable[[SSMPolicy, Shard], Result], shards: Sequence[Shard]) -> list[Result]:
        """`work` on every shard, in order, on the learner's threads, with a module that no other thread uses."""

        def lent(shard: Shard) -> Result:
            module = self._modules.get()
            try:
                return work(module, shard)
            finally:
                self._modules.put(module)

        # A new thread knows of torch's number of threads only from its first parallel operation on; what comes before
        # is rounded by the number of cores.
        own = 1 if self.device.type == "cpu" else torch.get_num_threads()
        with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(own,)) as threads:
            return list(threads.map(lent, shards))

    def optimizer_arrays(self) -> dict[str, Array]:
        """Adam's moments and step counts, for a checkpoint."""
        return optimizer_arrays(self.policy, self.optimizer)

    def load(self, weights: Mapping[str, Array], optimizer: Mapping[str, Array]) -> None:
        """Take parameters and moments of a checkpoint, see `load_state`; learning rates stay those of the config.

        Raises:
            ValueError: a name or shape does not fit; nothing is changed.
        """
        load_state(self.policy, self.optimizer, weights, optimizer)
        self._normalize(weights)
        self._set_rate(self.config.outer_lr)

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]

    def check_rates(self, inner_lr: float, outer_lr: float) -> None:
        """Refuse to continue with other learning rates than these; called after a restore, where others lose them.

        Raises:
            RuntimeError: the optimiser's or the inner step's learning rate is another one.
        """
        groups = self.optimizer.param_groups
        outer, wanted = [group["lr"] for group in groups], [outer_lr * group["share"] for group in groups]
        if outer != wanted or self.config.inner_lr != inner_lr:
            raise RuntimeError(
                f"The learner has outer_lr {outer} and inner_lr {self.config.inner_lr} "
                f"instead of {wanted} and {inner_lr}."
            )


class _Step:
    """An update's Adam steps, of which the last one can be taken back in part.

    Adam's first steps are as long as its learning rate for every parameter, whatever the gradient: a policy that is
    sure of itself, and starts with a new optimiser, can be ruined by one.
    """

    shorter = 0.25
    most = 12

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self.shortened = 0

    def take(self) -> None:
        """A step along the gradients that are set."""
        self._before = [parameter.detach().clone() for parameter in self._parameters()]
        self._optimizer.step()

    def shorten(self) -> bool:
        """Go back three quarters of the last step, and make the next ones as short; False where it makes no sense."""
        if not self._before or self.shortened >= self.most:
            return False
        self.shortened += 1
        for group in self._optimizer.param_groups:
            group["lr"] *= self.shorter
        with torch.no_grad():
            for parameter, before in zip(self._parameters(), self._before, strict=True):
                parameter.copy_(before + self.shorter * (parameter - before))
        return True

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def keep_freed_memory() -> None:
    """Let this process reuse what it frees instead of handing it back to the kernel; without effect where not glibc.

    A meta-update allocates and frees whole sequences a hundred times; fetching their pages anew every time took a sixth
    of its time. The process keeps the most memory it ever had.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # From malloc.h: one arena for all threads, no block of its own by mmap, no trimming (up to 2 GiB),
        # and 64 MiB more at a time than asked for, which keeps a thread's heaps, too.
        for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            mallopt(parameter, value)


def optimizer_arrays(policy: SSMPolicy, optimizer: torch.optim.Optimizer) -> dict[str, Array]:
    """Adam's moments and step counts as arrays by `parameter.moment`."""
    arrays = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            arrays[f"{name}.{key}"] = value.detach().cpu().numpy().copy()
    return arrays


def load_state(
    policy: SSMPolicy,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Array],
    moments: Mapping[str, Array],
) -> None:
    """Put the weights and moments of a checkpoint into a policy and its Adam.

    Args:
        weights: by parameter name, of exactly this policy's shapes.
        moments: as from `optimizer_arrays`.

    Raises:
        ValueError: a name or shape does not fit; nothing is changed.
    """
    own = dict(policy.named_parameters()) | dict(policy.named_buffers())
    misfit = {name for name in own.keys() | weights.keys() if name not in own or name not in weights}
    misfit |= {name for name in own.keys() & weights.keys() if tuple(own[name].shape) != weights[name].shape}
    # Adam keeps all three of its numbers for a parameter, or, without a gradient so far, none.
    for name in {key.rpartition(".")[0] for key in moments}:
        shape = tuple(own[name].shape) if name in own else None
        for moment, size in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
            key = f"{name}.{moment}"
            if shape is None or key not in moments or moments[key].shape != size:
                misfit.add(key)
    misfit |= {key for key in moments if key.rpartition(".")[2] not in ("step", "exp_avg", "exp_avg_sq")}
    if misfit:
        raise ValueError(f"The checkpoint's policy has other sizes: {', '.join(sorted(misfit))} do not fit.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.as_tensor(weights[name]))
    optimizer.state.clear()
    for key, value in moments.items():
        name, moment = key.rsplit(".", 1)
        tensor = torch.as_tensor(np.array(value))
        # Adam keeps its step count on the CPU whatever the parameters' device.
        optimizer.state[own[name]][moment] = tensor if moment == "step" else tensor.to(own[name].device)


def resolve_device(name: str) -> str:
    """The device of this machine that "auto" stands for; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        ValueError: with one sentence.
    """
    name = resolve_device(name)
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
