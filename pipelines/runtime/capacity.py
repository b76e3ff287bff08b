"""Checks, before work starts, that the cluster can hold what a stage requests; Ray itself would wait forever.

The check counts existing nodes, regardless of other users' work on them. Ray has no public API for what an autoscaler
may add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from pbe.settings import ActorResources, TaskResources
from pipelines.runtime.stage import StageError

GIB = 1 << 30
# Ray's label for a node's pool; KubeRay and `ray up` set it, a manual `ray start` does not
NODE_GROUP = "ray.io/node-group"

Bundle = Mapping[str, float]  # Ray's resources by Ray's names: CPU, GPU, memory (bytes)


@dataclass(frozen=True)
class Demand:
    """What a stage needs at one time. params.yaml has `each` under `key`, the count under `count_key` (None: 1)."""

    each: TaskResources
    key: str
    count: int = 1
    count_key: str | None = None


def ray_resources(each: TaskResources) -> dict[str, float]:
    """Return the resources by Ray's names, without zeros."""
    wanted = {"CPU": each.cpus, "memory": round(each.memory_gib * GIB)}
    if isinstance(each, ActorResources):
        wanted["GPU"] = each.gpus
    return {name: amount for name, amount in wanted.items() if amount}


def refuse_unmet(stage: str, demand: Demand) -> None:
    """Raise StageError when the nodes cannot hold the demand at once and no autoscaler may add nodes.

    With an autoscaler, print what is missing; Ray then waits and reports what it waits for.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    each = ray_resources(demand.each)
    if fits(each, demand.count, nodes):
        return
    asked = f"{demand.key}: {_described(each)}"
    if demand.count_key:
        asked = f"{demand.count_key}: {demand.count}, {asked}"
    where = f"{len(nodes)} nodes with" if len(nodes) != 1 else "one node with"
    have = "; ".join(_described(node) for node in nodes)
    lower = f"{demand.count_key} or {demand.key}" if demand.count_key else demand.key
    unmet = f"{stage}: {asked} does not fit on {where} {have}"
    if not any(NODE_GROUP in node["Labels"] for node in alive):
        raise StageError(f"{unmet}; lower {lower}, or add nodes")
    advice = f"if no pool is large enough, lower {lower}"
    print(f"{unmet}; waiting for the autoscaler to add nodes; {advice}", flush=True)


def fits(each: Bundle, count: int, nodes: Sequence[Bundle]) -> bool:
    """Return whether `count` equal bundles fit on the nodes together, each bundle on a single node."""
    return sum(_room(each, node, count) for node in nodes) >= count


def _room(bundle: Bundle, node: Bundle, most: int) -> int:
    """Return how many copies of the bundle the node holds, at most `most`."""
    return min([most, *(int((node.get(name, 0) + 1e-9) / amount) for name, amount in bundle.items())])


def _described(bundle: Bundle) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs"}
    parts = [f"{bundle[name]:g} {names[name]}" for name in names if bundle.get(name)]
    if bundle.get("memory"):
        parts.append(f"{bundle['memory'] / GIB:.1f} GiB of memory")
    return ", ".join(parts) or "nothing"
