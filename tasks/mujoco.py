"""`halfcheetah-dir`, `halfcheetah-vel` and `ant-dir`: robots that are to run a hidden way.

The locomotion tasks of MAML (Finn et al. 2017, section 5.3, arXiv 1703.03400) on gymnasium's own models and with
the semantics of its HalfCheetah-v5 and Ant-v5: from the same state the same action leads to the same state, bit by
bit when MuJoCo's solver starts both without a warm start. Only the reward differs, by the task. Needs the extra
`mujoco`; without it this module imports, and making a family raises a ValueError that says so.

All episodes take a step in one call of `mujoco.rollout`, on as many threads as `SSM_METARL_MUJOCO_THREADS` says.
The default is 1, since a run's parallelism is its workers: threads times workers should not exceed the cores.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.resources
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import check_count, lookup
from ssm_metarl.core import ReferenceReturns, Task, TaskDistribution
from ssm_metarl.tasks.batched import BatchedEnv
from ssm_metarl.tasks.parameters import Parameter, stack_parameters
from ssm_metarl.tasks.registry import load_extra

HORIZON = 200  # MAML's
THREADS_VARIABLE = "SSM_METARL_MUJOCO_THREADS"

Floats = NDArray[np.float64]

_LOW, _HIGH = np.float32(-1), np.float32(1)


# --- MuJoCo -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Robot:
    """One of gymnasium's robots; lengths in m, time in s.

    Attributes:
        file: model among gymnasium's assets.
        positions, velocities, actuators: numbers of the model's coordinates, velocities and controls.
        hidden: how many coordinates, the first ones, are not observed: where the robot is on the floor.
        control_cost: weight of the squared actions in the reward.
        frame_skip: simulator steps of one environment step.
        start_noise: of an episode's first coordinates, uniform up to this; of its velocities the deviation of normal
            noise, or with `uniform_velocities` uniform, too.
        uniform_velocities: see there.
    """

    file: str
    positions: int
    velocities: int
    actuators: int
    hidden: int
    control_cost: float
    frame_skip: int = 5
    start_noise: float = 0.1
    uniform_velocities: bool = False

    @property
    def observation_space(self) -> Box:
        """Coordinates but the hidden ones, then velocities."""
        return Box(-np.inf, np.inf, (self.positions - self.hidden + self.velocities,), np.float32)

    @property
    def action_space(self) -> Box:
        """Torques as shares of the largest."""
        return Box(_LOW, _HIGH, (self.actuators,), np.float32)


HALF_CHEETAH = Robot("half_cheetah.xml", positions=9, velocities=9, actuators=6, hidden=1, control_cost=0.1)
ANT = Robot("ant.xml", positions=15, velocities=14, actuators=8, hidden=2, control_cost=0.5)


@functools.cache
def load_model(file: str) -> Any:
    """The compiled model of one of gymnasium's assets, an `MjModel` that all environments of the process share."""
    mujoco = importlib.import_module("mujoco")
    xml = (importlib.resources.files("gymnasium") / "envs/mujoco/assets" / file).read_text()
    # MuJoCo 4 finds an attribute of half_cheetah.xml outdated and would write that to a file where the user works.
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        return mujoco.MjModel.from_xml_string(xml)
    finally:
        mujoco.set_mju_user_warning(None)


# --- Environments -----------------------------------------------------------------------------------------


class MujocoEnv(BatchedEnv):
    """N robots of one kind, each with a task of its own; a family's environment adds the reward.

    An episode slot's state is MuJoCo's: time, coordinates, velocities. What the solver remembers of the last step (its
    warm start) is not part of it: every step begins at zero. It only shortens the solver's way, and an episode cannot
    depend on the thread, or on the slot, that the memory came from.

    Actions are clipped to [-1, 1], and the cost is that of the clipped actions, as in MAML's code; gymnasium leaves
    clipping to MuJoCo and counts the actions as they came. An episode whose action is NaN, or whose simulation
    became unstable so that MuJoCo put the robot back to its start, has NaN for that step's reward: `collect`
    drops it.

    Args:
        parameters: the tasks' parameters, arrays [N].
        horizon: most steps of an episode.
        threads: threads that share the episode slots of a step, 1 or more.
    """

    robot: ClassVar[Robot]

    def __init__(self, parameters: dict[str, Floats], horizon: int, threads: int) -> None:
        num_envs, robot = len(next(iter(parameters.values()))), self.robot
        self._parameters = parameters
        super().__init__(self.space(robot), robot.action_space, num_envs, horizon)
        mujoco = importlib.import_module("mujoco")
        rollout = importlib.import_module("mujoco.rollout")
        model = load_model(robot.file)
        threads = min(threads, num_envs)
        self._rollout = rollout.Rollout(nthread=0 if threads == 1 else threads)
        self._models = self._own_models(model)
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        self._control_spec = int(mujoco.mjtState.mjSTATE_CTRL)
        self._step_time = model.opt.timestep * robot.frame_skip
        self._initial = np.concatenate([model.qpos0, np.zeros(model.nv)])

        # Views: row 0 of the state is the time, the floor's coordinates come next, then what is observed.
        self._state = np.zeros((num_envs, 1 + robot.positions + robot.velocities))
        self._time = self._state[:, 0]
        self._place = self._state[:, 1 : 1 + robot.hidden]
        self._observed = self._state[:, 1 + robot.hidden :]
        self._substeps = np.zeros((num_envs, robot.frame_skip, self._state.shape[1]))
        self._controls = np.zeros((num_envs, robot.frame_skip, robot.actuators))
        self._no_warm_start = np.zeros((num_envs, robot.velocities))

    @staticmethod
    def space(robot: Robot) -> Box:
        """Of one observation."""
        return robot.observation_space

    def _own_models(self, model: Any) -> list[Any]:
        """The model of each slot, all of the sizes of `model`."""
        return [model] * self.num_envs

    def _contact_cost(self) -> Floats | float:
        """Cost of the contact forces at the end of a step, [N]."""
        return 0.0

    @abc.abstractmethod
    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Rewards [N] and terminated [N] of a step.

        Args:
            velocity: [N, hidden], m/s, the mean over the step of each coordinate on the floor.
            cost: [N], of the controls and of contacts.
        """

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._rollout.close()

    def _start(self, slots: NDArray[np.intp]) -> None:
        sizes, noise = (self.robot.positions, self.robot.velocities), self.robot.start_noise
        away = np.empty((len(slots), sum(sizes)))
        for row, slot in zip(away, slots.tolist(), strict=True):
            generator = self._generator(slot)
            row[: sizes[0]] = generator.uniform(-noise, noise, sizes[0])
            if self.robot.uniform_velocities:
                row[sizes[0] :] = generator.uniform(-noise, noise, sizes[1])
            else:
                row[sizes[0] :] = noise * generator.standard_normal(sizes[1])
        self._state[slots, 0] = 0.0
        self._state[slots, 1:] = self._initial + away

    def _advance(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        clipped = actions.astype(np.float32, copy=False).clip(_LOW, _HIGH)
        # accumulate, unlike sum, adds in one order whatever the layout.
        squares = np.add.accumulate(np.square(clipped), axis=1, dtype=np.float64)[:, -1]
        self._controls[:] = np.fmax(clipped, _LOW)[:, None]  # a number for NaN, of which MuJoCo would complain
        place, time = self._place.copy(), self._time.copy()
        self._rollout.rollout(
            self._models,
            self._data,
            self._state,
            self._controls,
            control_spec=self._control_spec,
            skip_checks=True,
            nstep=self.robot.frame_skip,
            initial_warmstart=self._no_warm_start,
            state=self._substeps,
        )
        self._state[:] = self._substeps[:, -1]
        velocity = (self._place - place) / self._step_time
        rewards, terminated = self._judge(velocity, self.robot.control_cost * squares + self._contact_cost())
        # MuJoCo sets an unstable simulation back, and its clock with it.
        rewards[self._time - time < 0.9 * self._step_time] = np.nan
        return rewards.astype(np.float32), terminated

    def _observe(self) -> NDArray[np.float32]:
        return self._observed.astype(np.float32, order="C")


class DirectedCheetah(MujocoEnv):
    """N half cheetahs; reward: velocity in the task's direction, 1 or -1, less the cost."""

    robot = HALF_CHEETAH

    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        return self._parameters["direction"] * velocity[:, 0] - cost, np.zeros(self.num_envs, dtype=np.bool_)


class PacedCheetah(MujocoEnv):
    """N half cheetahs; reward: minus the distance of the velocity from the task's, less the cost."""

    robot = HALF_CHEETAH

    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        miss = np.abs(velocity[:, 0] - self._parameters["velocity"])
        return -miss - cost, np.zeros(self.num_envs, dtype=np.bool_)


class DirectedAnt(MujocoEnv):
    """N ants; reward: velocity in the task's direction, plus 1 while healthy, less the cost.

    Healthy is Ant-v5's: a finite state with the torso between 0.2 m and 1 m above the floor; else the episode
    terminates. The velocity is that of the torso's coordinates. Ant-v5 takes it from positions that MuJoCo's
    integrator leaves behind short of the step's end, which differ by up to some hundredths of a m/s.
    """

    robot = ANT
    MIN_HEIGHT, MAX_HEIGHT = 0.2, 1.0

    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        height = self._observed[:, 0]
        healthy = (height >= self.MIN_HEIGHT) & (height <= self.MAX_HEIGHT) & np.isfinite(self._state).all(axis=1)
        angle = self._parameters["angle"]
        return np.cos(angle) * velocity[:, 0] + np.sin(angle) * velocity[:, 1] + healthy - cost, ~healthy


# --- Families ---------------------------------------------------------------------------------------------


class MujocoFamily(TaskDistribution):
    """What the families of this module share.

    Args:
        horizon: most steps of an episode.
        threads: that a vector environment uses, 1 or more; None: as many as the environment variable
            `SSM_METARL_MUJOCO_THREADS` says where the family is made, 1 if it is not set. The workers of a run
            use what was set for the process that started it.

    Attributes:
        robot: whose spaces these are.

    Raises:
        ValueError: MuJoCo is not installed, or an argument or the variable is not an integer of 1 or more.
    """

    recommended = presets.of_task("mujoco")
    in_context = presets.of_task("mujoco", "rl2")
    robot: ClassVar[Robot]
    environment: ClassVar[type[Any]]
    parameters: ClassVar[dict[str, Parameter]]

    def __init__(self, *, horizon: int = HORIZON, threads: int | None = None) -> None:
        load_extra("mujoco", "MuJoCo", self.name)
        self.horizon = check_count("horizon", horizon, 1)
        if threads is None:
            text = os.environ.get(THREADS_VARIABLE) or "1"
            number = int(text) if text.isascii() and text.isdigit() else text
            self.threads = check_count(THREADS_VARIABLE, number, 1)
        else:
            self.threads = check_count("threads", threads, 1)
        self.observation_space = self.environment.space(self.robot)
        self.action_space = self.robot.action_space

    def make_vector_env(self, tasks: Sequence[Task], num_episodes: int) -> MujocoEnv:
        """Build the environments of `tasks`; see `TaskDistribution.make_vector_env`."""
        stacked = stack_parameters(tasks, self.parameters, num_episodes)
        env: MujocoEnv = self.environment(stacked, self.horizon, self.threads)
        return env


class HalfCheetahDir(MujocoFamily):
    """Run forward or backward; a task is `{"direction": 1}` or `{"direction": -1}`, with equal chance.

    MAML's forward/backward half cheetah, with HalfCheetah-v5's control cost of 0.1 where MAML's code has 0.05.
    """

    name = "halfcheetah-dir"
    robot = HALF_CHEETAH
    environment = DirectedCheetah
    parameters: ClassVar[dict[str, Parameter]] = {"direction": Parameter(-1, 1, choices=(-1, 1))}
    splits = ("train", "validation", "test")
    enumerable = True
    # Printed by `python tests/tasks/test_mujoco.py` with MuJoCo 4.0: 2,000 episodes, each on its own training task.
    # random: actions of mean 0 and standard deviation 0.5, an untrained Gaussian policy's. No best is known.
    reference = ReferenceReturns(random=-28.31, random_sd=31.35, oracle=None)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n directions; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(self.splits), split, "split")
        return [{"direction": direction} for direction in rng.choice([-1, 1], n).tolist()]


# split -> range of a uniform draw, m/s; train, validation and test are MAML's.
VELOCITIES = {
    "train": (0.0, 2.0),
    "validation": (0.0, 2.0),
    "test": (0.0, 2.0),
    "shifted": (2.0, 2.5),
    "shifted-test": (2.5, 3.0),
}


class HalfCheetahVel(MujocoFamily):
    """Run at a hidden velocity; a task is `{"velocity": v}`, m/s.

    MAML's goal velocity: uniform over 0 to 2, with HalfCheetah-v5's control cost of 0.1 where MAML's code has 0.05.
    """

    name = "halfcheetah-vel"
    robot = HALF_CHEETAH
    environment = PacedCheetah
    parameters: ClassVar[dict[str, Parameter]] = {"velocity": Parameter(-20.0, 20.0)}
    splits = tuple(VELOCITIES)
    # Printed by `python tests/tasks/test_mujoco.py`; see HalfCheetahDir.
    reference = ReferenceReturns(random=-264.30, random_sd=103.68, oracle=None)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n velocities of a split; see `TaskDistribution.sample`."""
        low, high = lookup(VELOCITIES, split, "split")
        return [{"velocity": velocity} for velocity in rng.uniform(low, high, n).tolist()]


class AntDir(MujocoFamily):
    """Run in a hidden direction; a task is `{"angle": a}`, radians from the x axis, uniform over the circle.

    MAML's ant runs forward or backward only. The whole circle is ProMP's (Rothfuss et al. 2019, arXiv 1810.06784,
    `ant_rand_direc_2d.py`) and an option of PEARL's (Rakelly et al. 2019, arXiv 1903.08254, `ant_dir.py`).
    As in Ant-v5 with `include_cfrc_ext_in_observation=False` contact forces are not observed, and they cost
    nothing.
    """

    name = "ant-dir"
    robot = ANT
    environment = DirectedAnt
    parameters: ClassVar[dict[str, Parameter]] = {"angle": Parameter(0.0, 2 * math.pi)}
    splits = ("train", "validation", "test")  # the circle has no outside
    # Printed by `python tests/tasks/test_mujoco.py`, 1,000 episodes; see HalfCheetahDir.
    reference = ReferenceReturns(random=11.58, random_sd=29.16, oracle=None)

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n angles; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(self.splits), split, "split")
        return [{"angle": angle} for angle in rng.uniform(0.0, 2 * math.pi, n).tolist()]


FAMILIES = (HalfCheetahDir, HalfCheetahVel, AntDir)
"""For the registry: `register(family.name, family)`."""
