"""Can the cluster ever hold what a stage asks for? Asked before work starts: Ray itself would wait for ever.

What counts is the nodes that are there, whatever other people's work holds of them, and those that an autoscaler adds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util import placement_group, remove_placement_group

from pbe.settings import ActorResources, TaskResources
from pipelines.runtime.stage import StageError

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


def ray_resources(each: TaskResources) -> dict[str, float]:
    """As Ray names them; what is 0 is left out."""
    wanted = {"CPU": each.cpus, "memory": round(each.memory_gib * GIB)}
    if isinstance(each, ActorResources):
        wanted["GPU"] = each.gpus
    return {name: amount for name, amount in wanted.items() if amount}


def refuse_unmet(stage: str, demand: Demand, *, beside: Bundle | None = None) -> None:
    """Raises StageError when the nodes cannot hold the demand at once and no autoscaler adds such as can.

    beside: what must fit as well, so that the stage moves (a task that reads while actors hold their share).
    Where an autoscaler of version 2 says yes, it returns when the nodes are there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = ray_resources(demand.each)
    if fits(each, demand.count, nodes, beside=beside):
        return
    asked = f"{demand.key}: {_described(each)}"
    if demand.count_key:
        asked = f"{demand.count_key}: {demand.count}, {asked}"
    plus = f", and {_described(beside)} beside" if beside else ""
    where = f"{len(nodes)} nodes with" if len(nodes) != 1 else "one node with"
    have = "; ".join(_described(node) for node in nodes)
    lower = f"{demand.count_key} or {demand.key}" if demand.count_key else demand.key
    unmet = f"{stage}: {asked}{plus} does not fit on {where} {have}"
    version = autoscaler_version()
    if version is None:
        raise StageError(f"{unmet}; lower {lower}, or add nodes")
    print(f"{unmet}; waiting for the autoscaler to add nodes", flush=True)
    if version == 2 and not _nodes_come([each] * demand.count + ([beside] if beside else [])):
        raise StageError(
            f"{unmet}, nor on those that the autoscaler may add; lower {lower}, or give it larger or more nodes"
        )


def fits(each: Bundle, count: int, nodes: Sequence[Bundle], *, beside: Bundle | None = None) -> bool:
    """Whether `count` equal bundles fit on the nodes together, each on one of them, and `beside` too."""
    if beside is None:
        return sum(_room(each, node, count) for node in nodes) >= count
    for index, node in enumerate(nodes):
        left = {name: amount - beside.get(name, 0) for name, amount in node.items()}
        others = [*nodes[:index], *nodes[index + 1 :]]
        if _room(beside, node, 1) and fits(each, count, [left, *others]):
            return True
    return False


def _room(bundle: Bundle, node: Bundle, most: int) -> int:
    """How many of a bundle the node holds, `most` at most."""
    return min([most, *(int((node.get(name, 0) + 1e-9) / amount) for name, amount in bundle.items())])


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
    """Ask for room for all bundles at once, and wait until it is there or cannot ever be.

    The autoscaler calls impossible what does not fit beside other work, too. So its word counts when the cluster has no
    other work and no node is on its way.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    address = ray.get_runtime_context().gcs_address
    group = placement_group([dict(bundle) for bundle in bundles])
    refusals = 0
    try:
        while not group.wait(ASK_S):
            reply = GetClusterStatusReply()
            reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=60))
            state = reply.autoscaling_state
            refused = any(
                request.details.startswith(group.id.hex()) for request in state.infeasible_gang_resource_requests
            )
            moves = state.pending_instances or state.pending_instance_requests or _is_busy()
            refusals = refusals + 1 if refused and not moves else 0
            if refusals == 2:  # what the reply says of the cluster may be older than what it says of the request
                return False
        return True
    finally:
        remove_placement_group(group)


def _is_busy() -> bool:
    """Whether somebody holds resources of a node that is there."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return any(free.get(name, 0) < total.get(name, 0) - 1e-6 for name in ("CPU", "GPU", "memory"))


def _described(bundle: Bundle) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs"}
    parts = [f"{bundle[name]:g} {names[name]}" for name in names if bundle.get(name)]
    if bundle.get("memory"):
        parts.append(f"{bundle['memory'] / GIB:.1f} GiB of memory")
    return ", ".join(parts) or "nothing"
