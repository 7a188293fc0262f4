"""`cheetah-dir-v0`, `cheetah-vel-v0`, `ant-dir-v0`, `hopper-param-v0` and `walker-param-v0`: the field's protocols.

The families of this module have the rewards, ranges and observations with which meta-RL methods are compared: those of
variBAD's code (Zintgraf et al. 2020, arXiv 1910.08348), which PEARL (Rakelly et al. 2019, arXiv 1903.08254) and the
recurrent baselines of Ni et al. (2022, arXiv 2110.05038) share. Episodes have 200 steps, and a trial has two episodes.
A protocol that changes gets another version. The physics is that of the MuJoCo that is installed; published figures
are of MuJoCo 1.5 to 2.1.
"""

from __future__ import annotations

import abc
import copy
import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ssm_metarl import presets
from ssm_metarl.checks import lookup
from ssm_metarl.core import ReferenceReturns, Task
from ssm_metarl.tasks.mujoco import (
    ANT,
    HALF_CHEETAH,
    DirectedAnt,
    DirectedCheetah,
    Floats,
    MujocoEnv,
    MujocoFamily,
    PacedCheetah,
    Robot,
)
from ssm_metarl.tasks.parameters import Parameter

SPLITS = ("train", "validation", "test")

CHEETAH = replace(HALF_CHEETAH, control_cost=0.05)

TORSO_HEIGHT = 0.7
"""Metres of the cheetah's torso above its coordinate of height."""

CONTACT_WEIGHT, CONTACT_BOUND = 5e-4, 1.0

FASTEST = 10.0

SCALE = 3.0
"""Exponents of a body's parameters are uniform from minus this to this."""

BASES: Mapping[str, float] = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}
"""What a number of the model is multiplied by, to the power of the task's."""

HOPPER = Robot(
    "hopper.xml",
    positions=6,
    velocities=6,
    actuators=3,
    hidden=1,
    control_cost=1e-3,
    frame_skip=4,
    start_noise=5e-3,
    uniform_velocities=True,
)
WALKER = replace(HOPPER, file="walker2d.xml", positions=9, velocities=9, actuators=6)


# --- Environments -----------------------------------------------------------------------------------------


class _WithTorso(MujocoEnv):
    """Observes where the torso is, too: [x, y, z] in m."""

    @staticmethod
    def space(robot: Robot) -> Box:
        """Of one observation."""
        return Box(-np.inf, np.inf, (robot.observation_space.shape[0] + 3,), np.float32)

    def _observe(self) -> NDArray[np.float32]:
        place = np.zeros((self.num_envs, 3))
        place[:, 0], place[:, 2] = self._place[:, 0], TORSO_HEIGHT + self._observed[:, 0]
        return np.concatenate([self._observed, place], axis=1).astype(np.float32)


class DirectedCheetahV0(_WithTorso, DirectedCheetah):
    """N half cheetahs; reward: velocity in the task's direction less .05 · |a|²."""

    robot = CHEETAH


class PacedCheetahV0(_WithTorso, PacedCheetah):
    """N half cheetahs; reward: minus the distance of the velocity from the task's, less .05 · |a|²."""

    robot = CHEETAH


class DirectedAntV0(DirectedAnt):
    """N ants; reward: velocity along the task's angle, plus 1, less .5 · |a|² and .0005 · |contact forces|².

    Contact forces are MuJoCo's `cfrc_ext`, each clipped to [-1, 1], where its integrator last looked, as gymnasium's
    Ant-v5 reads them. An episode ends when the torso is not between .2 and 1 m high.
    """

    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        rewards, terminated = super()._judge(velocity, cost)
        return rewards + terminated, terminated  # the 1 is paid in the last step, too

    def _contact_cost(self) -> Floats:
        mujoco = importlib.import_module("mujoco")
        data, kind = self._data[0], int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
        cost = np.empty(self.num_envs)
        for slot, (model, state) in enumerate(zip(self._models, self._substeps[:, -2], strict=True)):
            mujoco.mj_setState(model, data, state, kind)
            data.ctrl[:] = self._controls[slot, -1]
            data.qacc_warmstart[:] = 0.0  # the same bits whatever was looked at before
            mujoco.mj_step(model, data)
            mujoco.mj_rnePostConstraint(model, data)
            forces = np.clip(data.cfrc_ext, -CONTACT_BOUND, CONTACT_BOUND)
            cost[slot] = CONTACT_WEIGHT * np.square(forces).sum()
        return cost


class _WithOtherBodies(MujocoEnv):
    """Robots of different masses, inertias, dampings and frictions; reward: velocity, plus 1, less .001 · |a|².

    The model's numbers are set and nothing is derived from them anew, as in the published code. Velocities are
    observed up to `FASTEST`.
    """

    lowest: ClassVar[float]
    highest: ClassVar[float]
    most_lean: ClassVar[float]
    most: ClassVar[float]

    def _own_models(self, model: Any) -> list[Any]:
        models: list[Any] = []
        rows = [np.concatenate([self._parameters[name][slot] for name in BASES]) for slot in range(self.num_envs)]
        for slot, row in enumerate(rows):
            if slot and np.array_equal(row, rows[slot - 1]):  # episodes of one task
                models.append(models[-1])
                continue
            own = copy.copy(model)
            for name, base in BASES.items():
                numbers = getattr(own, name)
                numbers[:] = getattr(model, name) * base ** self._parameters[name][slot].reshape(numbers.shape)
            models.append(own)
        return models

    def _judge(self, velocity: Floats, cost: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        state = self._state[:, 1:]
        healthy = np.isfinite(state).all(axis=1) & (np.abs(state[:, 2:]) < self.most).all(axis=1)
        healthy &= (state[:, 1] > self.lowest) & (state[:, 1] < self.highest) & (np.abs(state[:, 2]) < self.most_lean)
        return velocity[:, 0] + 1.0 - cost, ~healthy

    def _observe(self) -> NDArray[np.float32]:
        coordinates = self.robot.positions - self.robot.hidden
        velocities = self._observed[:, coordinates:].clip(-FASTEST, FASTEST)
        return np.concatenate([self._observed[:, :coordinates], velocities], axis=1).astype(np.float32)


class OtherHoppers(_WithOtherBodies):
    """N hoppers, which fall below .7 m or when they lean by .2."""

    robot = HOPPER
    lowest, highest, most_lean, most = 0.7, np.inf, 0.2, 100.0


class OtherWalkers(_WithOtherBodies):
    """N walkers, which fall below .8 m, above 2 m, or when they lean by 1."""

    robot = WALKER
    lowest, highest, most_lean, most = 0.8, 2.0, 1.0, np.inf


# --- Families ---------------------------------------------------------------------------------------------


class SuiteFamily(MujocoFamily):
    """What the families of this module share."""

    # References: printed by `python tests/tasks/test_meta_mujoco.py`, 1,000 episodes, each on its own task, of actions
    # of mean 0 and standard deviation 0.5, an untrained Gaussian policy's. No best is known.
    recommended = presets.of_task("meta-mujoco")
    in_context = presets.of_task("meta-mujoco", "rl2")
    splits = SPLITS

    @abc.abstractmethod
    def _draw(self, count: int, rng: np.random.Generator) -> Mapping[str, list[Any]]:
        """Values of so many tasks, by name."""

    def sample(self, n: int, rng: np.random.Generator, split: str = "train") -> list[Task]:
        """Draw n tasks, in all splits of the same range; see `TaskDistribution.sample`."""
        lookup(dict.fromkeys(self.splits), split, "split")
        drawn = self._draw(n, rng)
        return [{name: values[number] for name, values in drawn.items()} for number in range(n)]


class CheetahDir(SuiteFamily):
    """Run forward or backward; a task is `{"direction": 1}` or `{"direction": -1}`, with equal chance."""

    name = "cheetah-dir-v0"
    robot = CHEETAH
    environment = DirectedCheetahV0
    parameters: ClassVar[dict[str, Parameter]] = {"direction": Parameter(-1, 1, choices=(-1, 1))}
    enumerable = True
    reference = ReferenceReturns(random=-15.39, random_sd=32.17, oracle=None)

    def _draw(self, count: int, rng: np.random.Generator) -> Mapping[str, list[Any]]:
        return {"direction": rng.choice([-1, 1], count).tolist()}


class CheetahVel(SuiteFamily):
    """Run at a hidden velocity; a task is `{"velocity": v}`, m/s, uniform over 0 to 3."""

    name = "cheetah-vel-v0"
    robot = CHEETAH
    environment = PacedCheetahV0
    parameters: ClassVar[dict[str, Parameter]] = {"velocity": Parameter(-20.0, 20.0)}
    reference = ReferenceReturns(random=-348.35, random_sd=163.64, oracle=None)

    def _draw(self, count: int, rng: np.random.Generator) -> Mapping[str, list[Any]]:
        return {"velocity": rng.uniform(0.0, 3.0, count).tolist()}


class AntDirV0(SuiteFamily):
    """Run in one of two directions; a task is `{"angle": 1}` or `{"angle": -1}`, radians, with equal chance.

    The two are 115° apart: the code took ±1, meant for forward and backward, as an angle, and its figures are of that.
    """

    name = "ant-dir-v0"
    robot = ANT
    environment = DirectedAntV0
    parameters: ClassVar[dict[str, Parameter]] = {"angle": Parameter(-1, 1, choices=(-1, 1))}
    enumerable = True
    reference = ReferenceReturns(random=9.15, random_sd=28.35, oracle=None)

    def _draw(self, count: int, rng: np.random.Generator) -> Mapping[str, list[Any]]:
        return {"angle": rng.choice([-1, 1], count).tolist()}


class _ParameterFamily(SuiteFamily):
    """Robots whose bodies differ: a task is a list of exponents for each entry of `BASES`."""

    def _draw(self, count: int, rng: np.random.Generator) -> Mapping[str, list[Any]]:
        return {
            name: rng.uniform(-SCALE, SCALE, (count, each.size or 1)).tolist() for name, each in self.parameters.items()
        }


def _exponents(bodies: int, joints: int, geoms: int) -> dict[str, Parameter]:
    sizes = {"body_mass": bodies, "body_inertia": 3 * bodies, "dof_damping": joints, "geom_friction": 3 * geoms}
    return {name: Parameter(-SCALE, SCALE, size=size) for name, size in sizes.items()}


class HopperParam(_ParameterFamily):
    """Hop forward with another body; a task is a list of exponents for each of the model's arrays."""

    name = "hopper-param-v0"
    robot = HOPPER
    environment = OtherHoppers
    parameters = _exponents(bodies=5, joints=6, geoms=5)
    reference = ReferenceReturns(random=21.98, random_sd=18.69, oracle=None)


class WalkerParam(_ParameterFamily):
    """Walk forward with another body; see `HopperParam`."""

    name = "walker-param-v0"
    robot = WALKER
    environment = OtherWalkers
    parameters = _exponents(bodies=8, joints=9, geoms=8)
    reference = ReferenceReturns(random=6.85, random_sd=10.93, oracle=None)


FAMILIES = (CheetahDir, CheetahVel, AntDirV0, HopperParam, WalkerParam)
"""For the registry."""
