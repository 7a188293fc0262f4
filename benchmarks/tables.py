"""Published tables, and ours beside them: figures, intervals, goals met and missed, and what the trainings took.

    python benchmarks/tables.py --table bandits --seeds 0 1 2
    python benchmarks/tables.py --table bandits --quick

Players play the very trials that our policies are evaluated on. JSON goes to stdout; Markdown goes to stderr and to
`tables/NAME.md` under `--out`. A seed that is done is read from its line in `--runs`, one that was interrupted
goes on, and where `learning.py` has the same target they share its line; players and timings are made anew.

`--quick` shows within a minute that a table can be made, with next to no training and in a folder of its own.
Its figures say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import learning
import tyro
from _report import command, log, machine, report
from _table import (
    Bench,
    Row,
    Script,
    Table,
    episode,
    in_training,
    least,
    most,
    ours,
    paired,
    played,
    published,
    reported,
    reported_curve,
    returns,
    seconds,
    seconds_to,
    success,
)
from learning import Target
from render import section

from ssm_metarl import presets
from ssm_metarl.config import available_cores
from ssm_metarl.tasks import make
from ssm_metarl.tasks.baselines.play import BASELINE_POLICIES

# --- What is trained ----------------------------------------------------------------------------------------

BANDITS = {5: "bandit", 10: "bandit-10", 50: "bandit-50"}
"""Target by the number of arms."""


def bandit_promp(arms: int) -> dict[str, Any]:
    """What rl2 learns bandits with, and a gradient step, of which the half of a batch's pulls comes before."""
    return {
        **presets.of_algorithm("rl2"),
        **make("bandit", {"arms": arms}).in_context,
        "algorithm": "promp",
        "inner_steps": 1,
        "step_weights": (1.0, 1.0),
        "episodes": 1,
        # An iteration with a gradient step takes several times as long: fewer, and what is learned soon.
        "iterations": 150,
        "gae_lambda": 0.8,
    }


def imitation(player: str, iterations: int = 200, **options: Any) -> dict[str, Any]:
    """Imitation alone: rewards teach little more within as many steps."""
    how = {"imitate": player, "imitate_iterations": iterations, "iterations": iterations}
    return {**how, "outer_lr": 2e-3, "hidden_dim": 128, **options}


MANY_ARMS = {"hidden_dim": 256, "state_dim": 256, "outer_lr": 1e-3}
"""Room for a count and a sum of each of 50 arms."""


TABULAR = {10: "tabular-mdp", 25: "tabular-mdp-25"}
"""Target by the number of episodes."""

SHOWN = {
    **{f"bandit-{arms}-imitation": "index" for arms in BANDITS},
    **{f"tabular-mdp-{count}-imitation": "optimistic" for count in TABULAR},
    "wind-v0-imitation": "dead-reckoning",
}
"""Player by target."""

POPGYM = tuple(f"{task}-{difficulty}" for task in ("repeat-previous", "noisy-position-only-cartpole")
               for difficulty in ("easy", "medium", "hard"))  # fmt: skip

SUITE = {"cheetah-dir-v0": 1250, "cheetah-vel-v0": 312, "ant-dir-v0": 625, "wind-v0": 50}
"""Meta-iterations in the meta-RL suite: 20, 5, 10 and .75 M environment steps, fewer where trials end early."""


ML1 = {f"ml1-{env}-{algorithm}": (env, algorithm) for env in ("reach-v3", "push-v3") for algorithm in ("rl2", "promp")}
"""Environment and algorithm by target of Meta-World: 2 M environment steps each."""

STEPS = {"rl2": 0, "promp": 1}
"""Inner steps after which an algorithm is judged."""

CHEETAHS = {100: "halfcheetah-dir-100", 200: "halfcheetah-dir-200"}
"""Target by the horizon."""


def _with(target: Target, claim: str, steps: int = 0, **options: Any) -> Target:
    """A target with a claim and options of its own, judged by the table."""
    return replace(target, claim=claim, goal=None, max_seconds=None, steps=steps, options={**target.options, **options})


_bandit, _tabular = learning.TARGETS["bandit"], learning.TARGETS["tabular-mdp"]

TARGETS: Mapping[str, Target] = {
    **learning.TARGETS,
    **{
        f"bandit-{arms}": _with(_bandit, f"100 pulls of {arms} arms, played in context.", task_options={"arms": arms})
        for arms in (10, 50)
    },
    **{
        f"bandit-{arms}-promp": _with(
            _bandit,
            f"100 pulls of {arms} arms, and 100 more after a gradient step.",
            steps=1,
            **bandit_promp(arms),
            task_options={"arms": arms},
        )
        for arms in BANDITS
    },
    "tabular-mdp-25": _with(
        _tabular,
        "25 episodes in an unknown Markov decision process, played in context.",
        trial_episodes=25,
        # As many steps an iteration as with ten.
        meta_batch=make("tabular-mdp", {}).in_context["meta_batch"] * 10 // 25,
    ),
    **{
        f"bandit-{arms}-imitation": _with(
            _bandit,
            f"100 pulls of {arms} arms, learned from what the index player shows.",
            task_options={"arms": arms},
            **imitation("index", **(MANY_ARMS if arms == 50 else {})),
        )
        for arms in BANDITS
    },
    **{
        f"tabular-mdp-{trial_episodes}-imitation": _with(
            _tabular,
            f"{trial_episodes} episodes in an unknown Markov decision process, learned from what a planner shows.",
            trial_episodes=trial_episodes,
            meta_batch=2000 // trial_episodes,
            episodes=1,
            memory_slots=64,  # there are 50 states and actions to remember
            **imitation("optimistic"),
        )
        for trial_episodes in TABULAR
    },
    "wind-v0-imitation": Target(
        claim="75 steps in an unknown wind, learned from one who reckons it from the last move.",
        task="wind-v0",
        options={"algorithm": "rl2", **imitation("dead-reckoning", SUITE["wind-v0"], outer_lr=5e-3, hidden_dim=64)},
        num_tasks=2000,
        episodes=1,
        after=0,
        steps=0,
    ),
    **{
        task: Target(
            claim=f"{iterations} iterations on {task}, adapted to within a trial.",
            task=task,
            options={"algorithm": "rl2", "iterations": iterations},
            num_tasks=100,
            after=0,
            steps=0,
        )
        for task, iterations in SUITE.items()
    },
    **{
        name: Target(
            claim=f"2 M steps of {env} of Meta-World's ML1 with {algorithm}.",
            task=f"ml1:{env}",
            options={"algorithm": algorithm, "iterations": 100 if algorithm == "rl2" else 50},
            num_tasks=50,  # there are no others
            after=STEPS[algorithm],
            steps=STEPS[algorithm],
            on_train=True,
        )
        for name, (env, algorithm) in ML1.items()
    },
    "navigation-2d-promp": Target(
        claim="Gradient steps find the goal, by MAML's protocol, within ten minutes of training.",
        task="navigation-2d",
        options={"iterations": 200, "lr_schedule": "linear"},
        episodes=40,
    ),
    "navigation-2d-promp-memoryless": replace(learning.TARGETS["navigation-2d-memoryless"], episodes=40),
    "navigation-2d-rl2": Target(
        claim="Memory finds the goal; gradient steps, with which it was not trained, are small.",
        task="navigation-2d",
        options={"algorithm": "rl2", "inner_lr": 1e-4, "iterations": 250},
        episodes=40,
    ),
    **{
        name: Target(
            claim=f"A gradient step turns the cheetah, {horizon} steps an episode.",
            task="halfcheetah-dir",
            options={"iterations": 300, "task_options": {"horizon": horizon}},
            num_tasks=40,  # there are two: more are more chance alone
            episodes=20,
            steps=1,
        )
        for horizon, name in CHEETAHS.items()
    },
}

ITERATION = Script("iteration.py", quick=("--iterations", "1"))
SSM = Script("ssm.py", quick=("--repetitions", "1"))
RLLIB = Script("rllib.py", quick=("--env-steps", "2000", "--every", "1000", "--num-tasks", "8"), seeded=True)
CONTENDERS = {
    "RLlib's PPO with its LSTM": "rllib-lstm",
    "RLlib's PPO with our SSM (`policy-gradient`)": "rllib-ssm",
    "our `rl2`": "rl2",
}

# --- The tables ---------------------------------------------------------------------------------------------

TABLES: Mapping[str, Table] = {
    "bandits": Table(
        title="Bandits: return of 100 pulls",
        columns=tuple(f"{arms} arms" for arms in BANDITS),
        notes=(
            "Players and policies have the same held-out trials. `promp` stands with its first 100 pulls, before any "
            "gradient step, and below that with 100 more after a step on those.",
        ),
        rows=(
            Row("RL² (Duan et al. 2016)", published(78.7, 83.5, 84.9)),
            Row("SNAIL (Mishra et al. 2018)", published((79.1, 1.0), (83.5, 0.8), (85.1, 0.6))),
            Row("MAML (in Mishra et al. 2018)", published(67.1, 70.1, 70.3)),
            Row("Gittins index (in Duan et al. 2016)", published(78.3, 82.8, 85.2)),
            *(
                Row(f"player `{player}`", tuple(played(player, target) for target in BANDITS.values()))
                for player in ("thompson", "index")
            ),
            Row("ours, `rl2`", tuple(ours(target, returns(0)) for target in BANDITS.values())),
            Row(
                "`rl2` less `index`, paired",
                tuple(paired(target, "index") for target in BANDITS.values()),
                least(-0.4, -0.4, -0.4),
            ),
            Row(
                "ours, `promp`",
                tuple(ours(f"bandit-{arms}-promp", returns(0)) for arms in BANDITS),
                least(67.1, 70.1, 70.3),
            ),
            Row(
                "ours, `promp`, 100 more pulls after a step",
                tuple(ours(f"bandit-{arms}-promp", returns(1)) for arms in BANDITS),
            ),
        ),
    ),
    "tabular-mdp": Table(
        title="Tabular MDPs: return of a trial",
        columns=tuple(f"{episodes} episodes" for episodes in TABULAR),
        rows=(
            Row("RL² (Duan et al. 2016)", published(156.2, 445.7)),
            Row("SNAIL (a rerun)", published(160.1, None)),
            Row("OPSRL (in Duan et al. 2016)", published(144.1, 425.2)),
            Row("UCRL2 (in Duan et al. 2016)", published(146.6, 424.1)),
            *(
                Row(f"player `{player}`", tuple(played(player, target) for target in TABULAR.values()))
                for player in ("uniform", "psrl", "psrl-prior-0", "greedy", "optimistic")
            ),
            Row("ours, `rl2`", tuple(ours(target, returns(0)) for target in TABULAR.values()), least(160.0, 446.0)),
            Row("`rl2` less `psrl-prior-0`, paired", tuple(paired(name, "psrl-prior-0") for name in TABULAR.values())),
        ),
    ),
    "imitation": Table(
        title="Learned from a player that is shown: return of a trial",
        columns=(
            *(f"bandit, {arms} arms" for arms in BANDITS),
            *(f"MDP, {count} episodes" for count in TABULAR),
            "wind-v0",
        ),
        notes=(
            "The players are `index` for bandits, `optimistic` for MDPs and `dead-reckoning` for the wind. A policy "
            "learns to do in its own play what the player would; it then has the same held-out trials.",
            "The best published returns in the wind are 65 and 61; who knows the wind earns 62.2 here.",
        ),
        rows=(
            Row("RL² (Duan et al. 2016)", published(78.7, 83.5, 84.9, 156.2, 445.7, None)),
            Row(
                "SNAIL (Mishra et al. 2018; 10 episodes: a rerun)",
                published((79.1, 1.0), (83.5, 0.8), (85.1, 0.6), 160.1, 447.2, None),
            ),
            Row("the player", tuple(played(SHOWN[target], target) for target in SHOWN)),
            Row(
                "ours, imitation",
                tuple(ours(target, returns(0)) for target in SHOWN),
                least(None, None, None, 160.0, 450.0, 61.0),
            ),
            Row(
                "ours less the player, paired",
                tuple(paired(target, player) for target, player in SHOWN.items()),
                least(-0.3, -0.5, -1.0, None, None, None),
            ),
        ),
    ),
    "navigation-2d": Table(
        title="navigation-2d: return after gradient steps of 40 episodes",
        columns=("0 steps", "1 step", "2 steps", "3 steps", "training, s", "s to -17 after 1 step"),
        notes=(
            "`rl2` is trained without gradient steps. Seconds to -17 are those of all iterations from random weights "
            "until the return in training after the step, mean of the last three iterations, is above it.",
        ),
        rows=(
            Row("MAML (Finn et al. 2017)", published(-40.4, -11.7, -3.3, -3.2, None, None)),
            Row("pytorch-maml-rl, on such a machine", published(None, None, None, None, None, 258.0)),
            *(
                Row(
                    f"ours, {name}",
                    (
                        *(ours(target, returns(steps)) for steps in range(4)),
                        ours(target, seconds),
                        ours(target, seconds_to(-17.0)) if timed else None,
                    ),
                    (*goals, *most(600.0, 26.0 if timed else None)),
                )
                for name, target, goals, timed in (
                    ("`promp`", "navigation-2d-promp", least(-8.0, -5.0, -3.5, -3.0), True),
                    ("`promp` without memory", "navigation-2d-promp-memoryless", (None,) * 4, True),
                    ("`rl2`", "navigation-2d-rl2", least(-8.0, -5.0, -3.5, -3.0), False),
                )
            ),
        ),
    ),
    "speed": Table(
        title="Speed",
        columns=(
            "seconds of a meta-iteration",
            "block against LSTM, T=100 B=400, times faster",
            "block against LSTM, T=1000 B=20, times faster",
        ),
        notes=(
            "`iteration.py`'s meta-iteration with a policy of 8,997 parameters; `ssm.py`'s forward and backward pass. "
            "pytorch-maml-rl was measured on such a machine, in the same minutes as ours with 1.18 s.",
        ),
        rows=(
            Row("pytorch-maml-rl, its own policy of (64, 64)", published(6.0, None, None)),
            Row(
                "ours",
                (
                    reported(ITERATION, "seconds_per_iteration"),
                    reported(SSM, "forward_backward_vs_lstm"),
                    reported(SSM, "long_forward_backward_vs_lstm"),
                ),
                (*most(1.2), *least(3.0, 5.0)),
            ),
        ),
    ),
    "halfcheetah-dir": Table(
        title="halfcheetah-dir: return before and after one gradient step of 20 episodes",
        columns=tuple(f"horizon {horizon}, {when}" for horizon in CHEETAHS for when in ("before", "after")),
        rows=(
            Row("MAML (Finn et al. 2017)", published(None, None, -50.7, 293.0)),
            Row("ours, `promp`", tuple(ours(name, returns(steps)) for name in CHEETAHS.values() for steps in (0, 1))),
        ),
        curves={f"horizon {horizon}": in_training(name) for horizon, name in CHEETAHS.items()},
        curve_columns=("before", "after"),
    ),
    "popgym": Table(
        title="POPGym: return of an episode",
        columns=POPGYM,
        rows=(
            Row("the best of 13 memories (Morad et al. 2023)", published(*(TARGETS[name].goal for name in POPGYM))),
            Row(
                "player `lqg`, who knows the physics",
                tuple(played("lqg", name) if TARGETS[name].task in BASELINE_POLICIES else None for name in POPGYM),
            ),
            Row(
                "ours, `rl2`",
                tuple(ours(name, returns(0)) for name in POPGYM),
                least(*(TARGETS[name].goal for name in POPGYM)),
            ),
        ),
    ),
    "suite": Table(
        title="The meta-RL suite: return within a trial",
        columns=("cheetah-dir-v0, 2nd episode", "cheetah-vel-v0, trial", "ant-dir-v0, trial", "wind-v0"),
        notes=(
            "Published figures are of more steps (variBAD: 50 to 100 M for the first column) or learn off-policy. "
            "They are of MuJoCo 1.5 to 2.1.",
        ),
        rows=(
            Row("variBAD (Zintgraf et al. 2020)", published((2104.0, 87.0), None, None, None)),
            Row("best published", published(2507.0, -33.0, 2532.0, 65.0)),
            Row("second best published", published(2300.0, -62.0, 2318.0, 61.0)),
            Row(
                "ours, `rl2`",
                (ours("cheetah-dir-v0", episode(1)), *(ours(task, returns(0)) for task in list(SUITE)[1:])),
                least(1500.0, -62.0, 1200.0, 61.0),
            ),
        ),
        curves={task: in_training(task) for task in SUITE},
        curve_columns=("trial",),
    ),
    "metaworld": Table(
        title="Meta-World's ML1 after 2 M steps: episodes that succeed, in percent, and return of 500 steps",
        columns=("success, test tasks", "success, training tasks", "return, test tasks"),
        notes=("50 placements of the goal to train with, 50 others to test. `promp` is after one gradient step.",),
        rows=tuple(
            Row(
                f"ours, {env}, `{algorithm}`",
                (
                    ours(name, success(STEPS[algorithm])),
                    ours(name, success(STEPS[algorithm], "on_train")),
                    ours(name, returns(STEPS[algorithm])),
                ),
                least(90.0, None, None) if env == "reach-v3" else (),
            )
            for name, (env, algorithm) in ML1.items()
        ),
        curves={f"{env}, `rl2`": in_training(name) for name, (env, algorithm) in ML1.items() if algorithm == "rl2"},
        curve_columns=("return",),
    ),
    "policy-gradient": Table(
        title="cartpole: PPO with memory, return of 500",
        columns=("return", "steps", "seconds of training"),
        notes=("On held-out tasks; the same inputs, constants of PPO and tasks for all three.",),
        rows=tuple(
            Row(name, tuple(reported(RLLIB, "contenders", key, what) for what in ("return", "env_steps", "seconds")))
            for name, key in CONTENDERS.items()
        ),
        curves={name: reported_curve(RLLIB, "contenders", key, "curve") for name, key in CONTENDERS.items()},
        curve_columns=("return",),
    ),
}


@dataclass(frozen=True)
class Options:
    """Make a table.

    Attributes:
        table: which.
        quick: see that it can be made; the figures say nothing.
        seeds: of training; if none is given 0, 1 and 2, or with `--quick` 0.
        runs: file with a line for each seed that is done.
        out: folder of trainings and tables.
        num_workers: Ray actors that collect rollouts; 0: in process.
        learner_threads: threads of the learner.
    """

    table: Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(tuple(TABLES)))]
    quick: bool = False
    seeds: tuple[int, ...] = ()
    runs: Path = learning.RUNS
    out: Path = Path("runs/benchmarks")
    num_workers: int = 0
    learner_threads: int = field(default_factory=available_cores)


def main(options: Options) -> None:
    quick = options.quick
    seeds = options.seeds or ((0,) if quick else (0, 1, 2))
    out = options.out / "quick" if quick else options.out
    runs = out / "runs.jsonl" if quick else options.runs
    how = {"num_workers": options.num_workers, "learner_threads": options.learner_threads}
    made = TABLES[options.table].make(Bench(TARGETS, seeds, out, runs, quick=quick, **how))
    if quick:
        made["notes"].append("A trial of the code: the figures say nothing.")
    result = {"table": options.table, "quick": quick, "seeds": list(seeds), **made}
    file = out / "tables" / f"{options.table}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(section(options.table, {"command": command(), "machine": machine(), **result}) + "\n")
    log(file.read_text())
    report("tables", result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
