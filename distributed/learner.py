"""The central learner: meta-parameters, optimiser, adaptation and meta-update."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from ssm_metarl.algorithms.batch import (
    COMPARING,
    advantage_moments,
    draw_minibatches,
    mean_returns,
    outer_moments,
    standardized,
    step_totals,
    task_shards,
)
from ssm_metarl.algorithms.inner_loop import adapt_shard
from ssm_metarl.algorithms.normalizer import Normalizer
from ssm_metarl.algorithms.parameters import is_memory, of_tasks
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.registry import CRITICS, SCHEDULES, MetaConfig
from ssm_metarl.algorithms.rollouts import Array, Rollouts
from ssm_metarl.algorithms.shard import Gradient, ShardLoss, added, batch_of_shard, meta_gradient, tree_total
from ssm_metarl.algorithms.spec import PolicySpec
from ssm_metarl.config import MachineConfig
from ssm_metarl.distributed.collection import StageCollector
from ssm_metarl.distributed.optimizer import BoundedStep, load_state, optimizer_arrays
from ssm_metarl.distributed.stopwatch import Stopwatch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stage(NamedTuple):
    """The rollouts of a meta-batch after so many inner steps, as the objectives read them.

    Attributes:
        shards: which tasks stand in each.
        batches: of each shard; in a `LearnerGroup` references to them.
        complete: [M] bool, whether any episode of a task was kept.
        moments: what `standardized` still needs; None where it is done.
        imitates: whether the batches have demonstrations.
    """

    shards: Sequence[slice]
    batches: Sequence[Any]
    complete: Array
    moments: tuple[float, float] | None = None
    imitates: bool = False

    def imitating(self, demonstrations: Array) -> Stage:
        """The same with what a baseline policy would have done, of the shape of the meta-batch's actions."""
        batches = [
            batch._replace(
                demonstrated=torch.from_numpy(demonstrations[shard, : batch.share.shape[1]]).to(batch.share.device)
            )
            for shard, batch in zip(self.shards, self.batches, strict=True)
        ]
        return self._replace(batches=batches, imitates=True)


class Learner:
    """Holds the policy and improves it; the trainer calls it between rollouts:

        weights = learner.weights()
        support = learner.batch(weights, pool.collect(weights, ...))
        adapted = learner.adapt(weights, support)
        query = learner.batch(adapted, pool.collect(adapted, ...))
        statistics = learner.update([support, query], progress=iteration / iterations)

    The tasks of a meta-batch are cut into shards, each of which is computed for itself. On a CPU `learner_threads`
    Python threads work on them with one torch thread each (torch releases the interpreter lock), and the shards'
    gradients are added by halves: the result depends neither on the number of threads nor on who computes a shard.

    Args:
        spec: the policy's sizes.
        config: algorithm and learning rates.
        machine: device and threads.
        seed: of the initial weights.
        horizon: most steps of an episode slot.

    Attributes:
        longest: steps of the longest episode slot of the last meta-iteration, by which the next one is cut into shards:
            they must be known before anything is played.
    """

    def __init__(self, spec: PolicySpec, config: MetaConfig, machine: MachineConfig, seed: int, horizon: int) -> None:
        self.config = config
        self.longest = self._horizon = horizon
        self.device = torch.device(resolve_device(machine.device))
        self.policy = SSMPolicy(spec, seed).to(self.device)
        self.normalizer = Normalizer(spec, config.discount)
        memory, others = list[Tensor](), list[Tensor]()
        for name, parameter in self.policy.named_parameters():
            (memory if is_memory(name) else others).append(parameter)
        groups = [{"params": others, "share": 1.0}, {"params": memory, "share": config.memory_lr}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=config.outer_lr)
        self._set_rate(config.outer_lr)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        self._blas = ThreadpoolController()
        self._run = ShardThreads(spec, self.device, machine.learner_threads if self.device.type == "cpu" else 1)

    def use_threads(self, count: int) -> None:
        """Compute on so many threads from now on, where that is on a CPU; results do not depend on it."""
        if self.device.type == "cpu" and count != len(self._run.modules):
            self._run = ShardThreads(self.policy.spec, self.device, count)
            self._normalize({name: buffer.numpy() for name, buffer in self.policy.named_buffers()})

    def observe(self, rollouts: Sequence[Any]) -> None:
        """Take an iteration's rollouts into the running moments, with which the next one is normalised."""
        for each in rollouts:
            self._take_moments(each)
        self._normalize(self.normalizer.arrays())
        self.expect(max(int(each.lengths().max()) for each in rollouts))

    def expect(self, longest: int) -> None:
        """Cut the next meta-iteration into shards for episode slots of so many steps."""
        self.longest = min(max(longest, 1), self._horizon)

    def _take_moments(self, rollouts: Any) -> None:
        for shard in self.shards(*rollouts.kept().shape):
            self.normalizer.update(rollouts.select(shard))

    def _normalize(self, arrays: Mapping[str, Array]) -> None:
        for module in (self.policy, *self._run.modules):
            set_normalizer(module, arrays)

    def weights(self) -> dict[str, Array]:
        """Copies of the meta-parameters for workers."""
        return self.policy.numpy_weights()

    def shards(self, tasks: int, episodes: int) -> list[slice]:
        """The shards of a meta-batch of so many tasks with so many episode slots each."""
        return task_shards((tasks, self.longest, episodes), self.config.minibatches)

    def pieces(self, tasks: int, episodes: int) -> list[slice]:
        """The tasks whose rollouts are to stay together where they were played; none: they are brought here."""
        return []

    def first_episodes(self, rollouts: Any) -> list[Rollouts]:
        """Records that have of each task the first episode that was kept, at least."""
        return [rollouts]

    def collect(self, collector: StageCollector, episodes: int, watch: Stopwatch) -> tuple[list[Stage], list[Any]]:
        """Have a meta-batch played and adapt to it, stage by stage.

        Args:
            collector: plays its tasks.
            episodes: a task and stage.
            watch: counts the seconds to the phases "sample" and "adapt".

        Returns:
            The S+1 stages, and the rollouts of each.
        """
        weights: Any = self.weights()
        stages, collected = list[Stage](), list[Any]()
        for stage in range(self.config.inner_steps + 1):
            with watch("sample"):
                collected.append(collector(weights, episodes, stage))
            with watch("adapt"):
                stages.append(self.batch(weights, collected[-1]))
                if stage < self.config.inner_steps:
                    weights = self.adapt(weights, stages[-1])
        return stages, collected

    def batch(self, weights: Any, rollouts: Any) -> Stage:
        """Rollouts as the objectives read them, on the learner's device; `weights` (shared, or [M, ...]) acted."""
        config, scale = self.config, reward_scale(self.policy, self.config)
        shards = self.shards(*rollouts.kept().shape)
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in weights.items()}
        with self._blas.limit(limits=1, user_api="blas"):  # more threads round otherwise
            records = [rollouts.select(shard).trimmed() for shard in shards]
            level = mean_returns([step_totals(r, config, scale) for r in records if config.baseline in COMPARING])
            batches = self._run(
                lambda module, i: batch_of_shard(module, of_tasks(tensors, shards[i]), records[i], config, level),
                range(len(shards)),
            )
        moments = outer_moments([advantage_moments(batch, config) for batch in batches])
        batches = [standardized(batch, config, moments) for batch in batches]
        return Stage(shards, batches, rollouts.kept().any(1))

    def adapt(self, weights: Any, stage: Stage) -> Any:
        """The tasks' weights [M, ...] after one inner step from `weights` (shared, or [M, ...])."""
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in weights.items()}
        parts = self._run(
            lambda module, i: adapt_shard(module, of_tasks(tensors, stage.shards[i]), stage.batches[i], self.config),
            range(len(stage.shards)),
        )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def update(
        self, stages: Sequence[Stage], progress: float = 0.0, seed: np.random.SeedSequence | None = None
    ) -> dict[str, float]:
        """One meta-update: `epochs` × `minibatches` Adam steps on the meta-objective over one iteration's rollouts.

        Args:
            stages: S+1 of them, the s-th collected after s inner steps.
            progress: fraction of the run's iterations done, in [0, 1), for the learning-rate schedule.
            seed: of the minibatches' shards; needed where there are several.

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
        complete = np.logical_and.reduce([stage.complete for stage in stages]).astype(np.float32)
        shards = stages[0].shards
        assert seed is not None or config.minibatches == 1, "several minibatches need a seed"
        rng = None if config.minibatches == 1 else np.random.default_rng(seed)
        norms, ratio_error = [], 0.0
        references: dict[int, Any] = {}
        step = BoundedStep(self.optimizer)
        for epoch in range(config.passes):
            losses, order = list[ShardLoss](), list[int]()
            for part in draw_minibatches(len(shards), config.minibatches, rng):
                keep = epoch == 0 and rng is None and config.passes > 1
                found = self._gradient(objective, stages, part, complete, references, keep)
                moved = [shards[i] for i in part]
                # Whoever imitates may go as far as it takes.
                while not stages[-1].imitates and self._too_far(found[1], complete, moved) and step.shorten():
                    found = self._gradient(objective, stages, part, complete, references, keep)
                norms.append(self._set_gradient(found[0]))
                if not np.isfinite(norms[-1]):
                    raise FloatingPointError(
                        f"The meta-gradient is not finite in epoch {epoch + 1}; lower inner_lr ({config.inner_lr:g}) "
                        f"or outer_lr ({config.outer_lr:g})."
                    )
                step.take()
                losses += found[1]
                order += part
                if len(norms) == 1:
                    ratio_error = max(loss.log_ratio for loss in losses)
        counted = np.concatenate([complete[shards[i]] for i in order])
        return {
            "loss": float((np.concatenate([loss.losses for loss in losses]) * counted).sum())
            / max(float(counted.sum()), 1.0),
            "entropy": float(np.mean([loss.entropy for loss in losses])),
            "kl": float(np.concatenate([loss.kl for loss in losses]).mean()),
            "grad_norm": float(np.mean(norms)),
            "ratio_error": ratio_error,
            "learning_rate": learning_rate,
            "shortened_steps": float(step.shortened),
        }

    def _too_far(self, losses: Sequence[ShardLoss], complete: Array, shards: Sequence[slice]) -> bool:
        """Whether the adapted policies of the tasks that count are farther from those that acted than they may be."""
        counted = np.concatenate([complete[shard] for shard in shards]) > 0
        moved = np.concatenate([loss.moved for loss in losses])[counted]
        return bool(self.config.max_kl and len(moved) and not float(moved.mean()) <= self.config.max_kl)

    def _set_gradient(self, gradient: Gradient) -> float:
        """Hand the optimiser a gradient; returns its norm, to which at most it is then scaled down."""
        parameters = list(self.policy.parameters())
        for parameter, own in zip(parameters, gradient, strict=True):
            # Without a critic the value head has no part in a policy gradient.
            parameter.grad = own
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _gradient(
        self,
        config: MetaConfig,
        stages: Sequence[Stage],
        part: Sequence[int],
        complete: Array,
        references: dict[int, Any],
        keep: bool,
    ) -> tuple[Gradient, list[ShardLoss]]:
        """The meta-gradient of a minibatch, and the losses of its shards.

        Args:
            config: of the objective.
            stages: S+1 of them.
            part: numbers of the minibatch's shards.
            complete: [M], 1 for the tasks that count, 0 for the others.
            references: by shard, see `meta_gradient`; a shard that is not in it is its own reference.
            keep: put the shards' references into `references`.
        """
        parameters = dict(self.policy.named_parameters())
        weights = task_weights(stages[0].shards, part, complete)

        def work(module: SSMPolicy, i: int) -> tuple[Gradient, ShardLoss, Any]:
            batches = [stage.batches[part[i]] for stage in stages]
            weight = torch.from_numpy(weights[i]).to(self.device)
            return meta_gradient(module, parameters, batches, config, weight, references.get(part[i], ()))

        results = self._run(work, range(len(part)))
        if keep:
            references.update({shard: reference for shard, (_, _, reference) in zip(part, results, strict=True)})
        leaves = {(i, i + 1): gradient for i, (gradient, _, _) in enumerate(results)}
        return tree_total(len(part), leaves, added), [loss for _, loss, _ in results]

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

    def close(self) -> None:
        """End what computes elsewhere: nothing."""


class ShardThreads:
    """Threads that compute shards, each with a module that no other one uses meanwhile.

    functional_call lends its parameters to the module for the time of the call.

    Args:
        spec: the policy's sizes.
        device: of the modules.
        count: of threads.

    Attributes:
        modules: one a thread.
    """

    def __init__(self, spec: PolicySpec, device: torch.device, count: int) -> None:
        self.modules = [SSMPolicy(spec).to(device) for _ in range(count)]
        self._free: SimpleQueue[SSMPolicy] = SimpleQueue()
        for module in self.modules:
            self._free.put(module)
        self._on_cpu = device.type == "cpu"

    def __call__(self, work: Callable[[SSMPolicy, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` on every item, in order."""

        def lent(item: Item) -> Result:
            module = self._free.get()
            try:
                return work(module, item)
            finally:
                self._free.put(module)

        # A new thread knows of torch's number of threads only from its first parallel operation on; what comes before
        # is rounded by the number of cores.
        own = 1 if self._on_cpu else torch.get_num_threads()
        with ThreadPoolExecutor(len(self.modules), initializer=torch.set_num_threads, initargs=(own,)) as threads:
            return list(threads.map(lent, items))


def reward_scale(policy: SSMPolicy, config: MetaConfig) -> float:
    """What rewards are divided by for the advantages."""
    return policy.reward_scaling if config.baseline in CRITICS else 1.0


def set_normalizer(policy: SSMPolicy, arrays: Mapping[str, Array]) -> None:
    """Give a policy the normaliser of these weights."""
    for name, buffer in policy.named_buffers():
        buffer.copy_(torch.as_tensor(arrays[name]))


def task_weights(shards: Sequence[slice], part: Sequence[int], complete: Array) -> list[Array]:
    """The weight of each task's loss in a minibatch's mean over those that count, [m] float32 a shard."""
    each = [complete[shards[i]] for i in part]
    count = np.float32(max(sum(float(own.sum()) for own in each), 1.0))
    return [own / count for own in each]


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


def resolve_device(name: str) -> str:
    """The device of this machine that "auto" stands for; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str, num_learners: int = 0) -> None:
    """Refuse a device that torch does not have here; with learners a GPU may be elsewhere, see `check_resources`.

    Raises:
        ValueError: with one sentence.
    """
    if num_learners and name == "cuda":
        return
    name = resolve_device(name)
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
