"""Can the cluster ever hold what a stage asks for? Asked before work starts: Ray itself would wait for ever.

What counts is the nodes that are there, or those that an autoscaler may add; other people's work on them does not.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from pbe.config import ActorResources, TaskResources
from pipelines.stage import StageError

GIB = 1 << 30
AUTOSCALED_NODES = 1000  # of a group without a limit: as many as make no difference

Bundle = Mapping[str, float]  # Ray's resources by Ray's names: CPU, GPU, memory (bytes)


@dataclass(frozen=True)
class Demand:
    """What a stage holds at once. `key` of params.yaml sets `each`, `count_key` the count; no count_key: one task."""

    each: TaskResources
    key: str
    count: int = 1
    count_key: str | None = None

    @property
    def bundles(self) -> list[Bundle]:
        return [ray_resources(self.each)] * self.count


def ray_resources(each: TaskResources) -> dict[str, float]:
    """As Ray names them; what is 0 is left out."""
    wanted = {"CPU": each.cpus, "memory": each.memory_gib * GIB}
    if isinstance(each, ActorResources):
        wanted["GPU"] = each.gpus
    return {name: amount for name, amount in wanted.items() if amount}


def refuse_unmet(stage: str, demand: Demand, *, beside: Sequence[Bundle] = ()) -> None:
    """Raises StageError when neither the nodes nor what an autoscaler may add could hold the demand at once.

    beside: what must fit as well, so that the stage moves (tasks that read while actors hold their share).
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = [*demand.bundles, *beside]
    if fits(bundles, nodes) or fits(bundles, grown(nodes)):
        return
    asked = f"{demand.key}: {_described(ray_resources(demand.each))}"
    if demand.count_key:
        asked = f"{demand.count_key}: {demand.count}, {asked}"
    plus = "".join(f", and {_described(bundle)} beside" for bundle in beside)
    where = f"{len(nodes)} nodes with" if len(nodes) != 1 else "one node with"
    have = "; ".join(_described(node) for node in nodes)
    lower = f"{demand.count_key} or {demand.key}" if demand.count_key else demand.key
    raise StageError(f"{stage}: {asked}{plus} does not fit on {where} {have}; lower {lower}, or add nodes")


def fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """Whether all fit on the nodes together, each on one of them: the largest first, each where it just fits."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda each: sorted(each.items()), reverse=True):
        rooms = [node for node in free if all(node.get(name, 0) + 1e-9 >= amount for name, amount in bundle.items())]
        if not rooms:
            return False
        room = min(rooms, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        for name, amount in bundle.items():
            room[name] -= amount
    return True


def grown(nodes: Sequence[Bundle]) -> list[Bundle]:
    """The nodes once the autoscaler has added all that it may; as they are where there is none."""
    from ray._private.state import state  # Ray Train and Ray Data ask it the same; there is no public way

    config = state.get_cluster_config()
    if config is None:
        return list(nodes)
    groups: list[Bundle] = []
    for group in config.node_group_configs:
        count = min(group.max_count, AUTOSCALED_NODES) if group.max_count >= 0 else AUTOSCALED_NODES
        room = {name: float(amount) if amount >= 0 else float(sys.maxsize) for name, amount in group.resources.items()}
        groups += [room] * count
    return groups or list(nodes)


def _described(bundle: Bundle) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs"}
    parts = [f"{bundle[name]:g} {names[name]}" for name in names if bundle.get(name)]
    if bundle.get("memory"):
        parts.append(f"{bundle['memory'] / GIB:.1f} GiB of memory")
    return ", ".join(parts) or "nothing"
