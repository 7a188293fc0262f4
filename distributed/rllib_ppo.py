"""RLlib's PPO with the SSM policy as its module: ``train --algorithm policy-gradient``.

One policy learns on all tasks of a family at once, a new task every episode, and finds out which one it plays in its
recurrent state; no gradient step is differentiated. Runs and checkpoints are those of meta-training, so that each can
go on from the other's weights.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from torch import Tensor

from ssm_metarl.algorithms.inference import PolicySpec
from ssm_metarl.algorithms.maml import SCHEDULES
from ssm_metarl.algorithms.policy import SSMPolicy
from ssm_metarl.algorithms.rollouts import Array
from ssm_metarl.distributed.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ssm_metarl.distributed.config import TrainConfig
from ssm_metarl.distributed.learner import load_state, optimizer_arrays, resolve_device
from ssm_metarl.distributed.trainer import BAD_EPISODES_ALLOWED, EnvironmentFailure, check_resources, check_sizes
from ssm_metarl.seeds import Branch, seed_for
from ssm_metarl.tasks import TaskDistribution

COLUMNS = 20
"""Most episodes that a worker plays side by side: RLlib's time a step falls little beyond."""


def state_name(number: int) -> str:
    """Name in RLlib's batches of a tensor of ``SSMPolicy.initial_state``."""
    return f"ssm_{number}"


# --- The environment --------------------------------------------------------------------------------------


class TaskEnv(VectorEnv[Array, Array, Array]):
    """N columns that play episodes of a family, a new task each; an observation is what the policy reads.

    That is the observation and, with ``inputs="full"``, the previous action as it was sampled (one-hot if discrete),
    the previous reward and the start flag: the inputs that ``collect`` makes. The step after an episode's last one
    begins the next episode, whatever the action (``AutoresetMode.NEXT_STEP``, which RLlib expects). Infos of a last
    step hold ``return`` and ``length`` of the episode and, where the environment raised or gave a number that is not
    finite, ``error``; such an episode is truncated at the last good observation.

    RLlib builds it in every worker, and seeds it with its own seed and the worker's index.

    Args:
        config: ``distribution`` (the family), ``spec`` (the policy's) and ``num_envs``.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (gymnasium's type)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._family: TaskDistribution = config["distribution"]
        self._spec: PolicySpec = config["spec"]
        self.num_envs = int(config["num_envs"])
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (self._spec.input_size,), np.float32)
        action = self._family.action_space
        # A policy's actions, of which the bounds are those of PolicySpec.env_actions.
        self.single_action_space = (
            action if self._spec.discrete else spaces.Box(-np.inf, np.inf, action.shape, np.float32)
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seed = 0
        self._envs: list[VectorEnv[Any, Any, Any] | None] = [None] * self.num_envs
        self._episodes = [0] * self.num_envs
        self._inputs = np.zeros((self.num_envs, self._spec.input_size), np.float32)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._done = np.zeros(self.num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every column; equal seeds give equal tasks and equal chance.

        Args:
            seed: non-negative; None goes on with new episodes of the last one.
            options: none are known.

        Returns:
            Inputs of the policy [N, I] float32, and empty infos.
        """
        if seed is not None:
            assert isinstance(seed, int), "one seed for all columns"
            self._seed, self._episodes = seed, [0] * self.num_envs
        for column in range(self.num_envs):
            self._begin(column)
        return self._inputs.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Move every column one step, or begin its next episode.

        Args:
            actions: [N, A] float32, or [N] integers.

        Returns:
            Inputs of the policy [N, I] float32, rewards [N] float32, terminated and truncated [N] bool, infos.
        """
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        errors = np.full(self.num_envs, None, object)
        for column in range(self.num_envs):
            if self._done[column]:
                self._begin(column)
                continue
            try:
                rewards[column], terminated[column], truncated[column] = self._play(column, actions[column])
            except Exception:
                truncated[column], errors[column] = True, traceback.format_exc()
        self._done = terminated | truncated
        infos: dict[str, Any] = {}
        if self._done.any():
            values = {"return": self._returns.copy(), "length": self._lengths.copy(), "error": errors}
            for name, value in values.items():
                infos |= {name: value, f"_{name}": self._done.copy()}
        return self._inputs.copy(), rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close what the columns play in."""
        for env in self._envs:
            if env is not None:
                env.close()

    def _begin(self, column: int) -> None:
        """Draw a column's next task and put its first observation in place."""
        path = (column, self._episodes[column])
        self._episodes[column] += 1
        if (before := self._envs[column]) is not None:
            before.close()
        task = self._family.sample(1, np.random.default_rng(seed_for(self._seed, *path, 0)), "train")
        env = self._envs[column] = self._family.make_vector_env(task, 1)
        observation = env.reset(seed=seed_for(self._seed, *path, 1).generate_state(1).tolist())[0]
        self._returns[column] = self._lengths[column] = 0
        self._done[column] = False
        self._read(column, self._checked(observation[0]))
        if self._spec.inputs == "full":
            self._inputs[column, self._spec.observation_size :] = 0.0
            self._inputs[column, -1] = 1.0  # start flag

    def _play(self, column: int, action: Array) -> tuple[float, bool, bool]:
        """Step a column; return reward, terminated and truncated."""
        env = self._envs[column]
        assert env is not None, "reset comes before step"
        observation, rewards, terminated, truncated, infos = env.step(self._spec.env_actions(np.asarray(action))[None])
        done = bool(terminated[0] or truncated[0])
        last = np.asarray(infos["final_obs"][0] if done else observation[0], np.float32)
        reward = float(self._checked(np.asarray(rewards, np.float32))[0])
        self._read(column, self._checked(last))
        self._returns[column] += reward
        self._lengths[column] += 1
        size = self._spec.observation_size
        if self._spec.inputs == "full":
            self._inputs[column, size:] = 0.0
            if self._spec.discrete:
                self._inputs[column, size + int(action)] = 1.0
            else:
                self._inputs[column, size:-2] = action
            self._inputs[column, -2] = reward
        cut = bool(truncated[0]) or self._lengths[column] == self._family.horizon
        return reward, bool(terminated[0]), cut

    def _read(self, column: int, observation: Array) -> None:
        self._inputs[column, : self._spec.observation_size] = observation

    @staticmethod
    def _checked(numbers: Array) -> Array:
        if not np.isfinite(numbers).all():
            raise ValueError("observation or reward not finite.")
        return numbers


# --- The module -------------------------------------------------------------------------------------------


class SSMModule(TorchRLModule, ValueFunctionAPI):
    """An ``SSMPolicy`` as RLlib's workers and learner call it; its state dict is the policy's, name by name.

    Sequences come as [B, T, I], zero-padded at their end, each with the recurrent state before its first step
    (zero where an episode begins: a sequence never goes beyond one), of which each tensor has a name of its own.

    Values are in rewards as the environment gives them; the policy's critic itself speaks in units of its
    ``reward_scaling``.
    """

    def setup(self) -> None:
        """Build the policy that ``model_config["spec"]`` describes; RLlib calls it once."""
        self.ssm = SSMPolicy(PolicySpec.from_dict(self.model_config["spec"]))

    def get_initial_state(self) -> dict[str, Tensor]:
        """Zero state of one episode, as ``SSMPolicy.initial_state`` by :func:`state_name`; without blocks, empty."""
        return {state_name(i): each for i, each in enumerate(self.ssm.initial_state())}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Parameters and normaliser, as in a checkpoint's ``policy.safetensors``."""
        return self.ssm.numpy_weights()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`get_state`."""
        self.ssm.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, _, state = self._run(batch[Columns.OBS], batch)
        return {Columns.ACTION_DIST_INPUTS: logits, **({Columns.STATE_OUT: state} if state else {})}

    def _forward_train(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        inputs = batch[Columns.OBS]
        steps = int(batch[Columns.SEQ_LENS].max()) if Columns.SEQ_LENS in batch else inputs.shape[1]
        logits, values, _ = self._run(inputs[:, :steps], batch)
        if Columns.SEQ_LENS in batch:
            # A narrow distribution's density at the zeros after a sequence's end can be infinite in RLlib's ratio. The
            # gradient is then no number, masked or not.
            lengths = torch.as_tensor(batch[Columns.SEQ_LENS], device=logits.device)
            taken = torch.arange(steps, device=logits.device) < lengths[:, None]
            logits = torch.where(taken[..., None], logits, 0.0)
        missing = inputs.shape[1] - steps  # RLlib pads all sequences to max_seq_len: what no episode reaches is not run
        logits = torch.nn.functional.pad(logits, (0, 0, 0, missing))
        return {
            Columns.ACTION_DIST_INPUTS: logits,
            Columns.EMBEDDINGS: torch.nn.functional.pad(values, (0, missing)),
        }

    def compute_values(self, batch: Mapping[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values [B, T] of the steps in a batch; ``embeddings`` are those that ``forward_train`` has found already."""
        return self._forward_train(batch)[Columns.EMBEDDINGS] if embeddings is None else embeddings

    def _run(self, inputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Inputs of RLlib's distribution [B, T, ...], values [B, T] and the state after the last step."""
        stateful = self.is_stateful()
        sequence = inputs.transpose(0, 1) if stateful else inputs[None]  # the policy's axes: time first
        given = batch[Columns.STATE_IN] if stateful else {}
        before = [given[state_name(i)] for i in range(len(given))] if stateful else None
        output = self.ssm(sequence, state=before)
        if self.ssm.spec.discrete:
            logits = output.actions.logits
        else:
            normal = output.actions.base_dist
            logits = torch.cat([normal.loc, normal.scale.log()], -1)
        values = output.values * self.ssm.reward_scaling
        if not stateful:
            return logits[0], values[0], {}
        state = {state_name(i): each for i, each in enumerate(output.state)}
        return logits.transpose(0, 1), values.transpose(0, 1), state


# --- The algorithm ----------------------------------------------------------------------------------------


class EpisodicPPO(PPO):
    """RLlib's PPO, which also says what its last iteration did, and leaves out episodes that the environment spoiled.

    Attributes:
        finished: infos of the last steps of the iteration's finished episodes, see ``TaskEnv``.
        seconds: of the iteration, spent in ``sample``, ``update`` and, for copies of the weights to workers, ``ray``.
    """

    finished: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = {}

    @property
    def ssm(self) -> SSMPolicy:
        """The learner's policy."""
        return self._learner.module[DEFAULT_MODULE_ID].ssm

    @property
    def adam(self) -> torch.optim.Optimizer:
        """Its optimiser."""
        return self._learner.get_optimizer(DEFAULT_MODULE_ID)

    @property
    def _learner(self) -> Any:
        return self.learner_group._learner  # in this process, as ``ppo_config`` has it

    def _setup_logdir(self) -> None:
        # Alone, Trainable would make an empty folder under ~/ray_results for every algorithm.
        if self._storage:
            super()._setup_logdir()

    def training_step(self) -> None:
        """Sample, update, send the weights: as the method of PPO, with RLlib's own parts."""
        begin = time.perf_counter()
        episodes, found = synchronous_parallel_sample(
            worker_set=self.env_runner_group,
            max_env_steps=self.config.total_train_batch_size,
            sample_timeout_s=self.config.sample_timeout_s,
            _uses_new_env_runners=True,
            _return_metrics=True,
        )
        self.metrics.aggregate(found, key=ENV_RUNNER_RESULTS)
        self.finished = [episode.get_infos(-1) for episode in episodes if episode.is_done]
        good = [episode for episode in episodes if not (episode.is_done and episode.get_infos(-1).get("error"))]
        sampled = time.perf_counter()
        self.seconds = {"sample": sampled - begin, "update": 0.0, "ray": 0.0}
        if not good:
            return
        steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME))
        results = self.learner_group.update(
            episodes=good,
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: steps},
            num_epochs=self.config.num_epochs,
            minibatch_size=self.config.minibatch_size,
            shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        updated = time.perf_counter()
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group,
            policies=set(results[0]) - {ALL_MODULES},
            inference_only=True,
        )
        self.seconds = {
            "sample": sampled - begin,
            "update": updated - sampled,
            "ray": time.perf_counter() - updated,
        }


def ppo_config(
    config: TrainConfig, distribution: TaskDistribution, begin: int = 0, reward_scale: float = 1.0
) -> PPOConfig:
    """RLlib's configuration of a run, without its module.

    Args:
        config: of the run, with the algorithm "policy-gradient".
        distribution: the family.
        begin: iterations already done: chance and the learning rate's schedule go on from there.
        reward_scale: what rewards are divided by for the critic.
    """
    spec = config.policy_spec(distribution)
    episodes = config.meta_batch * config.episodes
    batch = episodes * distribution.horizon
    columns = max(1, min(COLUMNS, episodes // max(config.num_workers, 1)))

    def schedule(first: float) -> float | list[list[float]]:
        """Of RLlib's form: values at numbers of environment steps."""
        factors = [SCHEDULES[config.lr_schedule](i / config.iterations) for i in range(begin, config.iterations + 1)]
        points = [[i * batch, first * factor] for i, factor in enumerate(factors)]
        return points if config.lr_schedule != "constant" and len(points) > 1 else first

    # Less than the longest episode would round RLlib's sequences a minibatch down to none.
    minibatch = max(math.ceil(batch / config.minibatches), distribution.horizon + 1)
    rllib = PPOConfig(algo_class=EpisodicPPO)
    rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    rllib.environment(
        TaskEnv,
        env_config={"distribution": distribution, "spec": spec},
        # A policy reads the actions that it sampled; the environment maps them to its own unit.
        normalize_actions=False,
        clip_actions=False,
        disable_env_checking=True,
    )
    rllib.env_runners(
        num_env_runners=config.num_workers,
        num_envs_per_env_runner=columns,
        gym_env_vectorize_mode="vector_entry_point",
        sample_timeout_s=None,  # RLlib's minute would throw away what a slower worker has collected
    )
    rllib.learners(num_learners=0, num_gpus_per_learner=int(resolve_device(config.device).startswith("cuda")))
    rllib.training(
        lr=schedule(config.outer_lr),
        gamma=config.discount,
        lambda_=config.gae_lambda,
        clip_param=config.clip,
        entropy_coeff=schedule(config.entropy_bonus),
        use_kl_loss=False,
        # RLlib's values and targets are in rewards, the weight is of the error in units of the critic.
        vf_loss_coeff=config.value_weight / reward_scale**2,
        vf_clip_param=math.inf,  # the default gives no gradient where a value is off by more than sqrt(10)
        num_epochs=config.epochs,
        minibatch_size=minibatch if config.minibatches > 1 and minibatch <= batch else None,
        train_batch_size=batch,
        grad_clip=config.max_grad_norm,
        grad_clip_by="global_norm",
    )
    rllib.debugging(
        seed=int(seed_for(config.seed, Branch.ROLLOUTS, begin).generate_state(1)[0]) // 2, log_level="ERROR"
    )
    return rllib


class PolicyGradientTrainer:
    """Trains a policy with RLlib's PPO; ``train`` drives it as it drives ``MetaTrainer``.

    RLlib starts with the first :meth:`step`, with what was loaded until then. Ray must have been started.

    Args:
        config: of the run, with the algorithm "policy-gradient".
        distribution: the family itself, instead of the registered one that ``config.task`` names.
    """

    def __init__(self, config: TrainConfig, distribution: TaskDistribution | None = None) -> None:
        self.train_config = config
        self.distribution = distribution or config.family()
        self.spec = config.policy_spec(self.distribution)
        check_resources(config.num_workers)
        seed = seed_for(config.seed, Branch.INITIAL_WEIGHTS).generate_state(1)[0]
        self.meta_iteration = self.env_steps = 0
        # Of the policy, its Adam and its normaliser, while RLlib does not hold them.
        self._weights: Mapping[str, Array] = SSMPolicy(self.spec, int(seed)).numpy_weights()
        self._optimizer: Mapping[str, Array] = {}
        self._moments: Mapping[str, Any] = {}
        self._ppo: EpisodicPPO | None = None

    def step(self) -> dict[str, Any]:
        """One iteration of PPO: about ``meta_batch`` × ``episodes`` × horizon steps, in episodes that may be cut.

        Returns:
            As from ``MetaTrainer.step``: ``return_by_step`` and ``episode_length_by_step`` have one entry, the mean
            over the episodes that ended in the iteration; of the learner's statistics those that RLlib has.

        Raises:
            EnvironmentFailure: more than a tenth of the episodes were lost to the environment.
            RuntimeError: no worker returned anything.
        """
        begin = time.perf_counter()
        if self._ppo is None:
            self._ppo = self._build()
        ppo, config = self._ppo, self.train_config
        results = ppo.train()
        finished = [infos for infos in ppo.finished if not infos["error"]]
        errors = [infos["error"] for infos in ppo.finished if infos["error"]]
        if len(errors) > BAD_EPISODES_ALLOWED * len(ppo.finished):
            share = f"{len(errors)} of {len(ppo.finished)} episodes"
            raise EnvironmentFailure(f"{share} were lost; the first error:\n{errors[0]}")
        steps = int(results[ENV_RUNNER_RESULTS].get(NUM_ENV_STEPS_SAMPLED, 0))
        if not steps:
            raise RuntimeError("No worker returned an episode.")
        done = self.meta_iteration / config.iterations
        self.meta_iteration += 1
        self.env_steps += steps
        learned = results[LEARNER_RESULTS][DEFAULT_MODULE_ID]
        return {
            "iteration": self.meta_iteration,
            "env_steps": self.env_steps,
            # Where there are more workers than episodes in an iteration, none may have ended yet.
            "return_by_step": [float(np.mean([infos["return"] for infos in finished] or np.nan))],
            "episode_length_by_step": [float(np.mean([infos["length"] for infos in finished] or np.nan))],
            "seconds": {**ppo.seconds, "adapt": 0.0, "total": time.perf_counter() - begin},
            "restarts": ppo.env_runner_group.num_remote_worker_restarts(),
            "dropped_tasks": [],
            "missing_tasks": 0,
            "bad_episodes": len(errors),
            "loss": float(learned["total_loss"]),
            "entropy": float(learned["entropy"]),
            "grad_norm": float(learned["gradients_default_optimizer_global_norm"]),
            "learning_rate": config.outer_lr * SCHEDULES[config.lr_schedule](min(done, 1.0)),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Write a checkpoint folder, as ``MetaTrainer`` does."""
        checkpoint = Checkpoint(
            spec=self.spec,
            config=self.train_config.to_dict(),
            progress={
                "iteration": self.meta_iteration,
                "env_steps": self.env_steps,
                **({"normalizer": self._moments} if self._moments else {}),
            },
            policy=self.weights(),
            optimizer=self.optimizer_arrays(),
        )
        save_checkpoint(Path(checkpoint_dir), checkpoint)
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint of this run's sizes, before the first :meth:`step`.

        Raises:
            CheckpointError: the folder is damaged, or its policy has other sizes.
        """
        loaded = load_checkpoint(checkpoint)
        check_sizes(checkpoint, loaded.spec, self.spec)
        self.start_from(loaded)
        self._optimizer = loaded.optimizer
        self.meta_iteration = int(loaded.progress["iteration"])
        self.env_steps = int(loaded.progress["env_steps"])

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint of this run's sizes, and its normaliser, which does not change any more."""
        assert self._ppo is None, "RLlib has begun with other weights"
        self._weights = checkpoint.policy
        self._moments = checkpoint.progress.get("normalizer", {})

    def weights(self) -> dict[str, Array]:
        """Copies of the parameters and the normaliser."""
        return dict(self._weights) if self._ppo is None else self._ppo.ssm.numpy_weights()

    def optimizer_arrays(self) -> dict[str, Array]:
        """Adam's moments and step counts as arrays by ``parameter.moment``."""
        return dict(self._optimizer) if self._ppo is None else optimizer_arrays(self._ppo.ssm, self._ppo.adam)

    def stop(self) -> None:
        """End the workers."""
        if self._ppo is not None:
            self._weights, self._optimizer = self.weights(), self.optimizer_arrays()
            self._ppo.stop()
            self._ppo = None

    def _build(self) -> EpisodicPPO:
        """RLlib's algorithm with the present weights and moments."""
        scale = float(self._weights["reward_scale"][0]) if self.spec.normalizes else 1.0
        config = ppo_config(self.train_config, self.distribution, begin=self.meta_iteration, reward_scale=scale)
        model = {"spec": self.spec.to_dict(), "max_seq_len": self.distribution.horizon + 1}
        config.rl_module(rl_module_spec=RLModuleSpec(module_class=SSMModule, model_config=model))
        ppo = build(config, self.train_config.learner_threads)
        load_state(ppo.ssm, ppo.adam, self._weights, self._optimizer)
        ppo.env_runner_group.sync_weights(from_worker_or_learner_group=ppo.learner_group, inference_only=True)
        return ppo


def build(config: PPOConfig, threads: int) -> EpisodicPPO:
    """Start RLlib's workers and its learner, in this process, with as many threads; Ray must have been started.

    Without files of RLlib's own, and with torch as it was but for the threads.
    """
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(), _without_stderr():
            warnings.simplefilter("ignore")
            return EpisodicPPO(config)
    finally:
        # RLlib's seed turns them on, for the whole process and its other torch code.
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's native code warns there, of every worker, that it can be restarted only while its configuration is kept;
    RLlib keeps it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
