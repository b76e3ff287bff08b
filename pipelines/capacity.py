"""Can the cluster ever hold what a stage asks for? Asked before work starts: Ray itself would wait for ever.

What counts is the nodes that are there, whatever other people's work holds of them, and those that an autoscaler adds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util import placement_group, remove_placement_group

from pbe.config import ActorResources, TaskResources
from pipelines.stage import StageError

GIB = 1 << 30
ASK_S = 2  # between two looks at what the autoscaler says

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
    wanted = {"CPU": each.cpus, "memory": round(each.memory_gib * GIB)}
    if isinstance(each, ActorResources):
        wanted["GPU"] = each.gpus
    return {name: amount for name, amount in wanted.items() if amount}


def refuse_unmet(stage: str, demand: Demand, *, beside: Sequence[Bundle] = ()) -> None:
    """Raises StageError when the nodes cannot hold the demand at once and no autoscaler adds such as can.

    beside: what must fit as well, so that the stage moves (tasks that read while actors hold their share).
    Where an autoscaler of version 2 says yes, it returns when the nodes are there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = [*demand.bundles, *beside]
    if fits(bundles, nodes):
        return
    asked = f"{demand.key}: {_described(ray_resources(demand.each))}"
    if demand.count_key:
        asked = f"{demand.count_key}: {demand.count}, {asked}"
    plus = "".join(f", and {_described(bundle)} beside" for bundle in beside)
    where = f"{len(nodes)} nodes with" if len(nodes) != 1 else "one node with"
    have = "; ".join(_described(node) for node in nodes)
    lower = f"{demand.count_key} or {demand.key}" if demand.count_key else demand.key
    unmet = f"{stage}: {asked}{plus} does not fit on {where} {have}"
    version = autoscaler_version()
    if version is None:
        raise StageError(f"{unmet}; lower {lower}, or add nodes")
    print(f"{unmet}; waiting for the autoscaler to add nodes", flush=True)
    if version == 2 and not _nodes_come(bundles):
        raise StageError(
            f"{unmet}, nor on those that the autoscaler may add; lower {lower}, or give it larger or more nodes"
        )


def fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """Whether all fit on the nodes together, each on one of them: the largest first, each where it just fits."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda each: sorted(each.items()), reverse=True):
        rooms = [node for node in free if all(node.get(name, 0) + 1e-9 >= amount for name, amount in bundle.items())]
        if not rooms:
            return False
        room = min(rooms, key=lambda node: [node.get(name, 0) for name in ("GPU", "CPU", "memory")])
        for name, amount in bundle.items():
            room[name] -= amount
    return True


def autoscaler_version() -> int | None:
    """Of the autoscaler that looks after the cluster; None: nodes are added by hand.

    Every Ray head runs a monitor; one of version 1 without an autoscaler's settings calls each node a type of its own.
    What its node types may grow to, no open source Ray tells; so version 1, which says nothing of what it cannot do
    either, is believed. Private names of Ray 2.60, as it has no public ones.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return 2
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return 1 if any(kind != f"node_{node}" for node, kind in types.items()) else None


def _nodes_come(bundles: Sequence[Bundle]) -> bool:
    """Ask for room for all bundles at once, and wait until it is there or the autoscaler says that it cannot be."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    address = ray.get_runtime_context().gcs_address
    group = placement_group([dict(bundle) for bundle in bundles])
    try:
        while not group.wait(ASK_S):
            reply = GetClusterStatusReply()
            reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=60))
            refused = reply.autoscaling_state.infeasible_gang_resource_requests
            if any(request.details.startswith(group.id.hex()) for request in refused):
                return False
        return True
    finally:
        remove_placement_group(group)


def _described(bundle: Bundle) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs"}
    parts = [f"{bundle[name]:g} {names[name]}" for name in names if bundle.get(name)]
    if bundle.get("memory"):
        parts.append(f"{bundle['memory'] / GIB:.1f} GiB of memory")
    return ", ".join(parts) or "nothing"
