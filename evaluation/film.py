"""What a policy does in an environment, as the environment renders it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssm_metarl.evaluation.player import Player, player_of
from ssm_metarl.tasks.external.family import AdaptedFamily
from ssm_metarl.tasks.external.importing import one_line
from ssm_metarl.tasks.external.lending import close_all

if TYPE_CHECKING:
    from ssm_metarl.evaluation.adapt import TaskReport
    from ssm_metarl.tasks.external.lending import PolicyEnv

MOST = 120
"""Frames of an episode, which is rendered only as often as that."""

FRAMES_PER_SECOND = 30.0
"""Of an environment that does not say."""


@dataclass(frozen=True)
class Film:
    """An episode, or a trial of several.

    Attributes:
        frames: [H, W, 3] each.
        returns: undiscounted return so far, one a frame.
        seconds: from one frame to the next.
    """

    frames: list[NDArray[np.uint8]]
    returns: list[float]
    seconds: float


def film_report(report: TaskReport, seed: int = 0) -> dict[str, Film]:
    """The policy before and after its adaptation, on the same task with the same seeds.

    Args:
        report: of the adaptation.
        seed: of resets and actions.

    Raises:
        ValueError: the family's environments do not render, or fail; one sentence.
    """
    family = report.family
    if not isinstance(family, AdaptedFamily):
        raise ValueError(f"{report.task} has no environment that renders; a video is of one's own, or of gym:ID.")
    films = {}
    for name, checkpoint in (("before", report.original), ("after", report.checkpoint)):
        env = family.filmed(report.parameters)
        try:
            films[name] = film(player_of(checkpoint, seed=seed), env, family.horizon, seed)
        except Exception as error:  # of the environment's own code, or of a library that it lacks
            raise ValueError(f"{report.task} cannot be filmed: {one_line(error)}") from error
        finally:
            close_all([env])
    return films


def film(player: Player, env: PolicyEnv, horizon: int, seed: int = 0) -> Film:
    """Play an episode, or a trial where the policy remembers over several, and render it.

    Args:
        player: the policy.
        env: made with `render_mode="rgb_array"`.
        horizon: most steps of an episode.
        seed: of the first reset.

    Raises:
        ValueError: it renders no picture. What the environment raises is passed on.
    """
    every = math.ceil(horizon * player.trial_episodes / MOST)
    frames, returns, total, steps = list[NDArray[np.uint8]](), list[float](), 0.0, 0
    last: dict[str, Any] = {}  # what led to the observation; nothing, at the start of a trial
    for episode in range(player.trial_episodes):
        observation, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            if steps % every == 0:
                frames.append(_frame(env))
                returns.append(total)
            action = player.act(observation, **last)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, steps, ended = total + float(reward), steps + 1, bool(terminated or truncated)
            last = {"reward": float(reward), "terminated": ended}
        frames.append(_frame(env))
        returns.append(total)
    rate = float(env.metadata.get("render_fps") or FRAMES_PER_SECOND)
    return Film(frames, returns, every / rate)


def _frame(env: PolicyEnv) -> NDArray[np.uint8]:
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"it renders {frame.dtype} {list(frame.shape)}, not [height, width, 3] of uint8")
    return frame
