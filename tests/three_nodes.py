"""A program of test_node_loss.py: a run on a cluster of three nodes on this machine, one of which is killed.

    python three_nodes.py train|learners|room|elastic|evolve FOLDER ANSWER

Writes one JSON object to the file ANSWER.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssm_metarl.cli.main import main
from ssm_metarl.config import TrainConfig
from ssm_metarl.distributed import dispatch
from ssm_metarl.distributed.schedule import Schedule
from ssm_metarl.distributed.train import train

SMALL = {"meta_batch": 6, "episodes": 2, "hidden_dim": 8, "state_dim": 4, "epochs": 1}
ITERATIONS = 30
# A lost node is noticed after seconds instead of a quarter of a minute.
IMPATIENT = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


EXPECTED = {1: 1, 4: 3, 8: 2}
"""Workers of an elastic run after some of its iterations."""


def cluster_of(head_cpus: int, *node_cpus: int) -> tuple[Cluster, list[Any]]:
    """A joined cluster, and its nodes beside the head."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": head_cpus, "include_dashboard": False, "_system_config": IMPATIENT},
    )
    nodes = [cluster.add_node(num_cpus=cpus) for cpus in node_cpus]
    cluster.wait_for_nodes()
    return cluster, nodes


def when(look: Callable[[], Any], action: Callable[[Any], object]) -> threading.Thread:
    """Do something in the background with what is looked for, as soon as there is something."""

    def watch() -> None:
        while not (found := look()):
            time.sleep(0.05)
        action(found)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def holders(name: str) -> dict[str, int]:
    """How many live actors whose class has this name each node holds, by the node's id."""
    found: dict[str, int] = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE" and actor["ActorClassName"].endswith(name):
            node = actor["Address"]["NodeID"]
            found[node] = found.get(node, 0) + 1
    return found


def run_train(folder: Path, num_workers: int = 3, num_learners: int = 0) -> dict[str, Any]:
    """Workers and learners over three nodes; as soon as two nodes hold some, a node that does is killed."""
    cluster, nodes = cluster_of(2, 2, 2)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    answer: dict[str, Any] = {}

    def kill_once(metrics: dict[str, Any]) -> None:
        """Between two iterations, once workers have started; they start beside the first iterations."""
        time.sleep(0.05)
        if answer or metrics["iteration"] < 2:
            return
        held: Counter[str] = Counter()
        while len(held) < 2 or not holders("RolloutWorker"):
            time.sleep(0.05)
            held = Counter(holders("RolloutWorker")) + Counter(holders("LearnerActor"))
        lost = next(node for node in nodes if node.node_id in held)
        answer.update(spread=sorted(held.values()), lost=held[lost.node_id])
        cluster.remove_node(lost, allow_graceful=False)

    config = TrainConfig.for_task("navigation-2d", **SMALL, iterations=ITERATIONS, learner_threads=1)
    config = config.replace(num_workers=num_workers, num_learners=num_learners)
    train(config, folder, on_iteration=kill_once)
    return {**answer, "alive": sum(node["Alive"] for node in ray.nodes())}


def run_learners(folder: Path) -> dict[str, Any]:
    """The same with as many of each kind as the two nodes that stay have room for."""
    return run_train(folder, num_workers=1, num_learners=2)


def run_room(folder: Path) -> dict[str, Any]:
    """Another's actor has the head; a node that holds a learner is killed, and workers have all other processors."""
    cluster, nodes = cluster_of(1, 3, 2)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    dispatch.PATIENCE = 1.0
    here = NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)
    other = ray.remote(Counter).options(num_cpus=1, scheduling_strategy=here).remote()
    ray.get(other.__ray_ready__.remote())
    answer: dict[str, Any] = {}

    def kill_once(metrics: dict[str, Any]) -> None:
        if metrics["iteration"] == ITERATIONS:
            answer.update(workers=sum(holders("RolloutWorker").values()))
        if answer or metrics["iteration"] < 2:
            return
        while sum(holders("RolloutWorker").values()) < 3:  # they start beside the first iterations
            time.sleep(0.05)
        learners = holders("LearnerActor")
        answer.update(learners=learners.get(nodes[1].node_id, 0))
        cluster.remove_node(nodes[1], allow_graceful=False)

    config = TrainConfig.for_task("navigation-2d", **SMALL, iterations=ITERATIONS, learner_threads=1)
    train(config.replace(num_workers=3, num_learners=2), folder, on_iteration=kill_once)
    return answer


def write_schedule(folder: Path) -> Path:
    """Ten iterations, with more epochs from the sixth on."""
    config = TrainConfig.for_task("navigation-2d", **SMALL, iterations=10, lr_schedule="constant", learner_threads=1)
    path = folder / "schedule.json"
    options = [[0, config.to_dict()], [5, {"epochs": 2}]]
    path.write_text(json.dumps({"iterations": 10, "weights": "last", "options": options}))
    return path


def run_elastic(folder: Path) -> dict[str, Any]:
    """A worker on the head; two nodes with a processor each join, and one of them is killed.

    Meanwhile a schedule changes an option, for which the trainer starts its workers anew.
    """
    cluster, _ = cluster_of(2)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    workers: dict[int, int] = {}

    def have(processors: int) -> None:
        while ray.cluster_resources().get("CPU") != processors:
            time.sleep(0.05)

    def change(metrics: dict[str, Any]) -> None:
        number = metrics["iteration"]
        if number == 2:
            joined.extend(cluster.add_node(num_cpus=1) for _ in range(2))
            have(4)
        if number == 6:
            cluster.remove_node(joined[0], allow_graceful=False)
            have(3)
        if number in EXPECTED:  # they start beside an iteration, and what was killed is noticed a moment later
            while sum(holders("RolloutWorker").values()) != EXPECTED[number]:
                time.sleep(0.05)
            workers[number] = EXPECTED[number]

    joined: list[Any] = []
    schedule = write_schedule(folder.parent)
    train(
        Schedule.read(schedule).config.replace(num_workers=1),
        folder,
        on_iteration=change,
        elastic=True,
        schedule=schedule,
    )
    return {"workers": workers}


def run_evolve(folder: Path) -> dict[str, Any]:
    """Three members of two processors each, at most one on the head; a node that holds one is killed after a race."""
    cluster, nodes = cluster_of(2, 4, 4)
    log = folder / "storage" / "evolved" / "rsi" / "events.jsonl"
    killed: list[str] = []

    def with_member() -> Any | None:
        held = holders("MemberTrainer") if lines(log) else {}
        return next((node for node in nodes if node.node_id in held), None)

    def kill(node: Any) -> None:
        killed.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)

    when(with_member, kill)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    rules = ["--proposals=2", "--cycles=6", "--assess-tasks=4"]
    storage = str(folder / "storage")
    where = ["--address", cluster.address, "--storage", storage, "--run-dir", f"{storage}/evolved"]
    code = main(["evolve", "--num-workers=1", *options, *rules, *where])
    return {"code": code, "killed": killed}


if __name__ == "__main__":
    runs = {"train": run_train, "learners": run_learners, "room": run_room}
    run = {**runs, "elastic": run_elastic, "evolve": run_evolve}[sys.argv[1]]
    answer = run(Path(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(answer))
    ray.shutdown()  # before the cluster ends, with which Ray would end this process
