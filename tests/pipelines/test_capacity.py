"""What fits on a cluster. On a real one: test_chain_changes.py (too many CPUs), test_cluster.py (no GPU)."""

import json
import os
import subprocess
import sys

import pytest
import ray

from pbe.config import load_params
from pbe.settings import ActorResources, TaskResources
from pipelines.runtime.capacity import GIB, NODE_GROUP, Bundle, Demand, fits, ray_resources, refuse_unmet
from pipelines.runtime.stage import StageError

HEAD: Bundle = {"CPU": 0, "memory": 4 * GIB}
CPU_NODE: Bundle = {"CPU": 8, "memory": 16 * GIB}
GPU_NODE: Bundle = {"CPU": 8, "GPU": 2, "memory": 64 * GIB}


@pytest.mark.parametrize(
    ("each", "count", "nodes", "expected"),
    [
        ({"CPU": 4}, 0, [], True),
        ({"CPU": 4}, 4, [CPU_NODE, CPU_NODE], True),
        ({"CPU": 5}, 3, [CPU_NODE, CPU_NODE], False),  # 15 of 16, but each on one node
        ({"CPU": 1, "GPU": 1}, 2, [HEAD, CPU_NODE], False),
        ({"CPU": 1, "memory": 9 * GIB}, 2, [CPU_NODE], False),
        ({"CPU": 0.1}, 10, [{"CPU": 1}], True),  # whatever floats add up to
        ({}, 3, [HEAD], True),
    ],
)
def test_bundles_fit_each_on_one_node(each: Bundle, count: int, nodes: list[Bundle], expected: bool) -> None:
    assert fits(each, count, nodes) is expected


def test_what_is_zero_is_not_asked_for() -> None:
    assert ray_resources(TaskResources(cpus=0.5, memory_gib=0)) == {"CPU": 0.5}
    assert ray_resources(ActorResources(cpus=1, gpus=0.5, memory_gib=2)) == {"CPU": 1, "GPU": 0.5, "memory": 2 * GIB}


def a_cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Bundle, pool: str | None = None) -> None:
    labels = {NODE_GROUP: pool} if pool else {}
    alive = [{"Alive": True, "Resources": dict(node), "Labels": labels} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 1000, "GPU": 1000}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, gone])


ENCODERS = Demand(ActorResources(cpus=4, gpus=1, memory_gib=8), "encode.per_actor", 3, "encode.actors")


def test_what_a_cluster_lacks_is_said_with_the_keys_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, HEAD, GPU_NODE)
    with pytest.raises(StageError) as error:
        refuse_unmet("encode", ENCODERS)
    assert str(error.value) == (
        "encode: encode.actors: 3, encode.per_actor: 4 CPUs, 1 GPUs, 8.0 GiB of memory does not fit on 2 nodes with "
        "4.0 GiB of memory; 8 CPUs, 2 GPUs, 64.0 GiB of memory; lower encode.actors or encode.per_actor, or add nodes"
    )


def test_a_cluster_of_pools_may_grow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a_cluster(monkeypatch, HEAD, pool="head")
    refuse_unmet("encode", ENCODERS)
    printed = capsys.readouterr().out
    assert "does not fit on one node with 4.0 GiB of memory; waiting for the autoscaler" in printed
    assert "lower encode.actors or encode.per_actor" in printed


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "gpu-pool"])
def test_ray_labels_the_nodes_of_a_pool_and_no_others(pool: str | None) -> None:
    """KubeRay and `ray up` start nodes with RAY_NODE_TYPE_NAME."""
    program = "import json, ray; ray.init('local', num_cpus=1, include_dashboard=False); print(json.dumps(ray.nodes()))"
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"RAY_NODE_TYPE_NAME": pool} if pool else {}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    (node,) = json.loads(done.stdout)
    assert node["Labels"].get(NODE_GROUP) == pool


def test_the_defaults_fit_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As local Ray counts them: never fewer than four CPUs (pipelines/runtime/local_ray.py)."""
    params = load_params()
    a_cluster(monkeypatch, {"CPU": 4, "memory": 4 * GIB})
    for name in ("ingest", "materialize"):
        refuse_unmet(name, Demand(getattr(params, name).per_shard, name))
    for name in ("encode", "bench", "edit", "evaluate"):
        cfg = getattr(params, name)
        refuse_unmet(name, Demand(cfg.per_actor, name, cfg.actors, name))
    for variant in params.variants:
        cfg = params.train_variant(variant)
        refuse_unmet("train", Demand(cfg.per_worker, "train", cfg.workers, "train"))
