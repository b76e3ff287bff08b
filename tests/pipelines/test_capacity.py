"""What fits on a cluster. On a real one: test_chain.py (too many CPUs), test_cluster.py (no GPU), and at the end of
this file one that has no nodes yet, but Ray's own autoscaler, which starts them on this machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import ray
from ray._private.services import get_node_ip_address

from pbe.config import load_params
from pbe.settings import ActorResources, TaskResources
from pipelines.runtime import capacity
from pipelines.runtime.capacity import GIB, Bundle, Demand, fits, ray_resources, refuse_unmet
from pipelines.runtime.stage import StageError
from tests.pipelines.ray_nodes import free_ports

HEAD: Bundle = {"CPU": 0, "memory": 4 * GIB}
CPU_NODE: Bundle = {"CPU": 8, "memory": 16 * GIB}
GPU_NODE: Bundle = {"CPU": 8, "GPU": 2, "memory": 64 * GIB}


@pytest.mark.parametrize(
    ("each", "count", "beside", "nodes", "expected"),
    [
        ({"CPU": 4}, 0, None, [], True),
        ({"CPU": 4}, 4, None, [CPU_NODE, CPU_NODE], True),
        ({"CPU": 5}, 3, None, [CPU_NODE, CPU_NODE], False),  # 15 of 16, but each on one node
        ({"CPU": 1, "GPU": 1}, 2, None, [HEAD, CPU_NODE], False),
        ({"CPU": 1, "GPU": 1}, 1, {"CPU": 8}, [GPU_NODE, CPU_NODE], True),  # what needs no GPU keeps off its node
        ({"CPU": 1, "memory": 9 * GIB}, 2, None, [CPU_NODE], False),
        ({"CPU": 0.1}, 10, None, [{"CPU": 1}], True),  # whatever floats add up to
        ({}, 3, None, [HEAD], True),
        # what needs no memory keeps off the node that has it
        ({"CPU": 0.5, "memory": 8}, 1, {"CPU": 1}, [{"CPU": 1, "memory": 9}, {"CPU": 1, "memory": 1}], True),
        ({"CPU": 0.5, "memory": 8}, 3, {"CPU": 1}, [{"CPU": 2, "memory": 24}, {"CPU": 4, "memory": 1}], True),
        ({"CPU": 0.5, "GPU": 1}, 12, {"CPU": 1}, [{"CPU": 2, "GPU": 4}, {"CPU": 64, "GPU": 8}], True),
        ({"CPU": 0.5, "GPU": 1}, 12, {"CPU": 3}, [{"CPU": 2, "GPU": 4}, {"CPU": 6, "GPU": 8}], False),
    ],
)
def test_bundles_fit_each_on_one_node(
    each: Bundle, count: int, beside: Bundle | None, nodes: list[Bundle], expected: bool
) -> None:
    before = [dict(node) for node in nodes]
    assert fits(each, count, nodes, beside=beside) is expected
    assert nodes == before


def test_what_is_zero_is_not_asked_for() -> None:
    assert ray_resources(TaskResources(cpus=0.5, memory_gib=0)) == {"CPU": 0.5}
    assert ray_resources(ActorResources(cpus=1, gpus=0.5, memory_gib=2)) == {"CPU": 1, "GPU": 0.5, "memory": 2 * GIB}


def a_cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Bundle, autoscaler: int | None = None) -> None:
    alive = [{"Alive": True, "Resources": dict(node)} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 1000, "GPU": 1000}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, gone])
    monkeypatch.setattr(capacity, "autoscaler_version", lambda: autoscaler)


ENCODERS = Demand(ActorResources(cpus=4, gpus=1, memory_gib=8), "encode.per_actor", 3, "encode.actors")


def test_what_a_cluster_lacks_is_said_with_the_keys_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, HEAD, GPU_NODE)
    with pytest.raises(StageError) as error:
        refuse_unmet("encode", ENCODERS)
    assert str(error.value) == (
        "encode: encode.actors: 3, encode.per_actor: 4 CPUs, 1 GPUs, 8.0 GiB of memory does not fit on 2 nodes with "
        "4.0 GiB of memory; 8 CPUs, 2 GPUs, 64.0 GiB of memory; lower encode.actors or encode.per_actor, or add nodes"
    )


def test_an_autoscaler_of_version_1_is_believed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_cluster(monkeypatch, HEAD, autoscaler=1)
    refuse_unmet("encode", ENCODERS)
    assert "does not fit on one node with 4.0 GiB of memory; waiting for the autoscaler" in capsys.readouterr().out


def test_actors_leave_room_for_what_feeds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Demand(ActorResources(cpus=1, gpus=0, memory_gib=0), "edit.per_actor", 2, "edit.actors")
    a_cluster(monkeypatch, {"CPU": 2})
    refuse_unmet("edit", two)
    with pytest.raises(StageError, match="and 1 CPUs beside does not fit on one node with 2 CPUs"):
        refuse_unmet("edit", two, beside={"CPU": 1})


def test_the_defaults_fit_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As local Ray counts them: never fewer than four CPUs (pipelines/runtime/parts.py)."""
    params = load_params()
    a_cluster(monkeypatch, {"CPU": 4, "memory": 4 * GIB})
    for name in ("ingest", "materialize"):
        refuse_unmet(name, Demand(getattr(params, name).per_bucket, name))
    for name in ("encode", "edit", "evaluate"):
        cfg = getattr(params, name)
        refuse_unmet(name, Demand(cfg.per_actor, name, cfg.actors, name), beside={"CPU": 1})
    for variant in params.variants:
        cfg = params.train_variant(variant)
        refuse_unmet("train", Demand(cfg.per_worker, "train", cfg.workers, "train"))


# -- Ray's own autoscaler ------------------------------------------------------------------------------------

# of the autoscaler's settings; all are empty
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
HEAD_ID = "f" * 51 + "00000"  # the node provider's name for the head
ASK = """
    import time
    import ray
    from pbe.config import ActorResources, TaskResources
    from pipelines.runtime.capacity import Demand, autoscaler_version, refuse_unmet
    from pipelines.runtime.stage import StageError

    ray.init({address!r}, logging_level="error", log_to_driver=False)
    print("version", autoscaler_version())
    if autoscaler_version() == 2:  # somebody else's work, for as long as the first question takes

        @ray.remote(num_cpus=4)
        def other():
            time.sleep(12)

        theirs = other.remote()
        time.sleep(8)
        refuse_unmet("beside others", Demand(TaskResources(cpus=8, memory_gib=0), "others.each", 2, "others.count"))
        print("beside others: fits when", ray.wait([theirs], timeout=0)[0] == [theirs])
    for name, each, count in [
        ("small", TaskResources(cpus=1, memory_gib=0), 1),
        ("large", TaskResources(cpus=5, memory_gib=0), 2),
        ("gpu", ActorResources(cpus=1, gpus=1, memory_gib=0), 1),
        ("many", TaskResources(cpus=8, memory_gib=0), 3),
    ]:
        try:
            refuse_unmet(name, Demand(each, f"{{name}}.each", count, f"{{name}}.count"))
            print(name, "fits on", sum(node["Alive"] for node in ray.nodes()))
        except StageError as error:
            print("refused:", error)
"""


def start_head(folder: Path, port: int, version: int | None) -> "subprocess.Popen[bytes]":
    """A head without CPUs, and an autoscaler that may add two nodes of 8: processes of this machine."""
    settings = {
        "cluster_name": "pretended",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{port}",
            "launch_multiple": version == 2,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": {
            "cpu": {"resources": {"CPU": 8}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in LISTS},
        "file_mounts_sync_continuously": False,
    }
    (folder / "autoscaler.json").write_text(json.dumps(settings))
    env = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    if version == 2:
        env |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
        env |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    dashboard, agent, client = free_ports(3)
    flags = {
        "num-cpus": 0,
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "object-store-memory": 100_000_000,
        "temp-dir": folder / "ray",
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    if version is not None:
        flags["autoscaling-config"] = folder / "autoscaler.json"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, 1, 2])
def test_pools_without_a_node_yet_are_asked_by_their_autoscaler(version: int | None) -> None:
    with TemporaryDirectory(prefix="pbe-as-") as folder:  # short: Ray's sockets are in it
        (port,) = free_ports(1)
        head = start_head(Path(folder), port, version)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (log := (Path(folder) / "log").read_text()):
                assert head.poll() is None and time.monotonic() < deadline, log
                time.sleep(0.2)
            time.sleep(5)  # its monitor's first look
            asked = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(ASK.format(address=f"{get_node_ip_address()}:{port}"))],
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                capture_output=True,
                text=True,
                timeout=100,
            )
        finally:
            kill_all_of(folder)
            head.wait()
    assert asked.returncode == 0, asked.stderr
    version_line, *answers = asked.stdout.splitlines()
    assert version_line == f"version {version}"
    waits = [line.split(":")[0] for line in answers if line.endswith("waiting for the autoscaler to add nodes")]
    refused = [line.split(":")[1].strip() for line in answers if line.startswith("refused:")]
    if version is None:
        assert refused == ["small", "large", "gpu", "many"] and not waits
    elif version == 1:
        assert waits == ["small", "large", "gpu", "many"] and not refused
    else:
        assert refused == ["gpu", "many"]
        assert "beside others: fits when True" in answers
        assert "small fits on 3" in answers and "large fits on 3" in answers
        assert sum("nor on those that the autoscaler may add" in line for line in answers) == 2


def kill_all_of(folder: str) -> None:
    """The head and the nodes that its autoscaler has started: all have its folder in their command."""
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and folder in " ".join(process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
