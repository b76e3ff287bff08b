"""What fits on a cluster. On a real one: test_chain.py (too many CPUs) and test_cluster.py (no GPU)."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state

from pbe.config import ActorResources, TaskResources, load_params
from pipelines.capacity import GIB, Bundle, Demand, fits, ray_resources, refuse_unmet
from pipelines.stage import StageError

HEAD: Bundle = {"CPU": 0, "memory": 4 * GIB}
CPU_NODE: Bundle = {"CPU": 8, "memory": 16 * GIB}
GPU_NODE: Bundle = {"CPU": 8, "GPU": 2, "memory": 64 * GIB}


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([], [], True),
        ([{"CPU": 4}] * 4, [CPU_NODE, CPU_NODE], True),
        ([{"CPU": 5}] * 3, [CPU_NODE, CPU_NODE], False),  # 15 of 16, but each on one node
        ([{"CPU": 1, "GPU": 1}] * 2, [HEAD, CPU_NODE], False),
        ([{"CPU": 8}, {"CPU": 1, "GPU": 1}], [GPU_NODE, CPU_NODE], True),  # what needs no GPU keeps off its node
        ([{"CPU": 1, "memory": 9 * GIB}] * 2, [CPU_NODE], False),
        ([{"CPU": 0.1}] * 10, [{"CPU": 1}], True),  # whatever floats add up to
    ],
)
def test_bundles_fit_each_on_one_node(bundles: list[Bundle], nodes: list[Bundle], expected: bool) -> None:
    before = [dict(node) for node in nodes]
    assert fits(bundles, nodes) is expected
    assert nodes == before


def test_what_is_zero_is_not_asked_for() -> None:
    assert ray_resources(TaskResources(cpus=0.5, memory_gib=0)) == {"CPU": 0.5}
    assert ray_resources(ActorResources(cpus=1, gpus=0.5, memory_gib=2)) == {"CPU": 1, "GPU": 0.5, "memory": 2 * GIB}


def a_cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Bundle, groups: list[tuple[Bundle, int]] | None = None) -> None:
    """groups: what its autoscaler may add, and how many of each (-1: no limit)."""
    alive = [{"Alive": True, "Resources": dict(node)} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 1000, "GPU": 1000}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, gone])
    config: Any = None
    if groups is not None:
        config = SimpleNamespace(
            node_group_configs=[SimpleNamespace(resources=dict(each), max_count=count) for each, count in groups]
        )
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)


ENCODERS = Demand(ActorResources(cpus=4, gpus=1, memory_gib=8), "encode.per_actor", 3, "encode.actors")


def test_what_a_cluster_lacks_is_said_with_the_keys_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, HEAD, GPU_NODE)
    with pytest.raises(StageError) as error:
        refuse_unmet("encode", ENCODERS)
    assert str(error.value) == (
        "encode: encode.actors: 3, encode.per_actor: 4 CPUs, 1 GPUs, 8.0 GiB of memory does not fit on 2 nodes with "
        "4.0 GiB of memory; 8 CPUs, 2 GPUs, 64.0 GiB of memory; lower encode.actors or encode.per_actor, or add nodes"
    )


def test_an_autoscaler_may_add_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, HEAD, groups=[({"CPU": 8, "GPU": 1, "memory": 64 * GIB}, 3)])
    refuse_unmet("encode", ENCODERS)
    a_cluster(monkeypatch, HEAD, groups=[({"CPU": 8, "GPU": 1, "memory": 64 * GIB}, -1)])
    refuse_unmet("encode", ENCODERS)
    a_cluster(monkeypatch, HEAD, groups=[({"CPU": 8, "GPU": 1, "memory": 64 * GIB}, 2)])
    with pytest.raises(StageError, match="does not fit"):
        refuse_unmet("encode", ENCODERS)


def test_actors_leave_room_for_what_feeds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Demand(ActorResources(cpus=1, gpus=0, memory_gib=0), "edit.per_actor", 2, "edit.actors")
    a_cluster(monkeypatch, {"CPU": 2})
    refuse_unmet("edit", two)
    with pytest.raises(StageError, match="and 1 CPUs beside does not fit on one node with 2 CPUs"):
        refuse_unmet("edit", two, beside=[{"CPU": 1}])


def test_the_defaults_fit_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As local Ray counts them: never fewer than four CPUs (pipelines/units.py)."""
    params = load_params()
    a_cluster(monkeypatch, {"CPU": 4, "memory": 4 * GIB})
    for name in ("ingest", "materialize"):
        refuse_unmet(name, Demand(getattr(params, name).per_bucket, name))
    for name in ("encode", "edit", "evaluate"):
        cfg = getattr(params, name)
        refuse_unmet(name, Demand(cfg.per_actor, name, cfg.actors, name), beside=[{"CPU": 1}])
    for variant in params.variants:
        cfg = params.train_variant(variant)
        refuse_unmet("train", Demand(cfg.per_worker, "train", cfg.workers, "train"))
