"""Offline tests of the cluster recipes in infra/: each file against its tool's validator and against what pbe needs."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from pipelines.cluster.working_dir import job_env
from pipelines.runtime.capacity import GIB, Bundle, Demand, fits, ray_resources
from pipelines.runtime.stage import CLUSTER_STAGES, open_stage
from tests.profiles import NAMES, profile

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
CLUSTER = yaml.safe_load((INFRA / "kuberay" / "raycluster.yaml").read_text())
JOB = yaml.safe_load((INFRA / "kuberay" / "rayjob.yaml").read_text())
LAUNCHER = yaml.safe_load((INFRA / "ray-cluster-aws.yaml").read_text())
GROUPS = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
POOLS = {name: kind for name, kind in LAUNCHER["available_node_types"].items() if name != LAUNCHER["head_node_type"]}
SLURM = (INFRA / "slurm.sh").read_text()

KUBERNETES = "1.33"  # the version whose schema checks pods
(RAY,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
RAY_OPTIONS = {option for parameter in ray_start.params for option in parameter.opts}


# -- each file against its tool


@pytest.mark.parametrize(
    "template",
    [*(group["template"] for group in GROUPS), JOB["spec"]["submitterPodTemplate"]],
    ids=[*(group.get("groupName", "head") for group in GROUPS), "submitter"],
)
def test_pods_are_kubernetes_pods(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_launcher_file_is_valid_for_ray_up() -> None:
    validate_config(prepare_config(LAUNCHER))  # with the defaults that `ray up` adds


def test_the_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n"], input=SLURM, text=True, check=True)


# -- what validators do not check


def test_a_job_gets_the_cluster_of_the_other_manifest() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_every_recipe_has_the_ray_of_the_lock_file() -> None:
    assert CLUSTER["spec"]["rayVersion"] == RAY
    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("Dockerfile"), INFRA / "README.md"]:
        tags = re.findall(r"/pbe:(\S+)", path.read_text())
        assert {tag for tag in tags if not re.fullmatch(rf"ray{re.escape(RAY)}-(cpu|cuda)\W*", tag)} == set(), path


def test_pods_and_nodes_with_gpus_have_the_cuda_image() -> None:
    for group in GROUPS:
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == container["image"].endswith("-cuda")
    for kind in POOLS.values():
        image = kind.get("docker", {}).get("worker_image", LAUNCHER["docker"]["image"])
        assert ("GPU" in kind["resources"]) == image.endswith("-cuda")


def test_ray_start_has_the_options_that_the_recipes_give() -> None:
    launched = " ".join(LAUNCHER["head_start_ray_commands"] + LAUNCHER["worker_start_ray_commands"])
    symmetric = re.search(r"ray symmetric-run (.*?) -- ", SLURM.replace("\\\n", " "), re.DOTALL)
    assert symmetric
    used = set(re.findall(r"--[a-z-]+", launched + symmetric[1])) - {"--address", "--min-nodes"}
    used |= {f"--{key}" for group in GROUPS for key in group["rayStartParams"]}
    assert used - RAY_OPTIONS == set()


def test_the_object_store_fits_shared_memory_and_that_the_pod() -> None:
    """/dev/shm is a volume in memory, and counts as the pod's memory."""
    for group in GROUPS:
        spec = group["template"]["spec"]
        (shm,) = (v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v.get("emptyDir", {}).get("medium"))
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store <= _bytes(shm) <= _bytes(spec["containers"][0]["resources"]["limits"]["memory"]) / 2


def test_the_rayjob_runs_a_stage_as_the_bridge_does() -> None:
    words = JOB["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "pipelines"] and words[3] in CLUSTER_STAGES and words[-2] == "--as-job"
    runtime_env = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])
    assert runtime_env["env_vars"].keys() <= job_env(open_stage("materialize"), "job-1").keys()
    assert all(isinstance(value, str) for value in runtime_env["env_vars"].values())  # Ray accepts nothing else


def _bytes(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity.removesuffix("Gi")) * GIB


def _pod_resources(group: dict[str, Any]) -> Bundle:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = float(limits.get("nvidia.com/gpu", 0))
    return {"CPU": float(limits["cpu"]), "GPU": gpus, "memory": _bytes(limits["memory"])}


NODES: dict[str, list[Bundle]] = {
    "kuberay": [_pod_resources(group) for group in GROUPS[1:] for _ in range(group["maxReplicas"])],
    "launcher": [  # Ray detects a node's memory when it starts
        {"CPU": 0, "GPU": 0, **kind["resources"], "memory": 1e15}
        for kind in POOLS.values()
        for _ in range(kind["max_workers"])
    ],
}
AT_ONCE = ("openimages-8gpu", "openimages-mini", "coco")  # the pools hold all their actors and ranks at once


@pytest.mark.parametrize("recipe", NODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_pools_hold_what_the_profiles_ask_for(recipe: str, name: str) -> None:
    params = profile(name)
    demands = [Demand(getattr(params, stage).per_shard, stage) for stage in ("ingest", "materialize")]
    demands += [
        Demand(cfg.per_actor, stage, cfg.actors)
        for stage, cfg in (
            ("encode", params.encode),
            ("bench", params.bench),
            ("edit", params.edit),
            ("evaluate", params.evaluate),
        )
    ]
    demands.append(Demand(params.train.per_worker, "train", params.train.workers))
    for demand in demands:
        count = demand.count if name in AT_ONCE else 1
        assert fits(ray_resources(demand.each), count, NODES[recipe]), demand


# -- the Slurm script, on one simulated node


@pytest.fixture
def allocation(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs slurm.sh on one simulated node: srun runs its command here, `ray symmetric-run` the command after --."""
    (tmp_path / "dvc.yaml").touch()
    programs = {
        ".venv/bin/ray": 'echo "auth $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH")"\n'
        'echo "address ${RAY_ADDRESS-none}"\n[[ -z $NO_RAY ]] || exit 0\n'
        'while [[ $1 != -- ]]; do shift; done\nshift\nexec "$@"',
        ".venv/bin/python": 'if [[ $2 == dvc ]]; then echo "ran ${*:3} at $RAY_ADDRESS"; exit "$DVC_CODE"; fi\n'
        "echo token",
        "bin/srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"',
        "bin/hostname": "echo 10.0.0.7 fe80::1",
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(*arguments: str, dvc: int = 0, ray: bool = True, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        variables = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "4242424",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "4",
            "DVC_CODE": str(dvc),
            "NO_RAY": "" if ray else "1",
        }
        script = shutil.copy(INFRA / "slurm.sh", tmp_path / "slurm_script")  # slurmd runs a copy in another folder
        return subprocess.run(["bash", script, *arguments], env=variables, capture_output=True, text=True)

    return run


def test_slurm_runs_dvc_repro_on_the_cluster_of_its_nodes(allocation: Callable, tmp_path: Path) -> None:
    done = allocation("-s", "train@full")
    assert done.returncode == 0, done.stderr
    assert (
        "auth token 600" in done.stdout and "address none" in done.stdout
    )  # symmetric-run must start a cluster, not join one
    assert "ran repro -s train@full at 10.0.0.7:22424" in done.stdout
    assert [path.name for path in (tmp_path / ".store/slurm/4242424").iterdir()] == [
        "exit-code"
    ]  # the token is deleted


@pytest.mark.parametrize(("how", "code", "message"), [({"dvc": 7}, 7, ""), ({"ray": False}, 1, "Ray did not start")])
def test_slurm_ends_as_dvc_does_and_fails_when_ray_does_not_start(
    allocation: Callable, how: dict[str, Any], code: int, message: str
) -> None:
    done = allocation("evaluate", **how)
    assert done.returncode == code and message in done.stderr


def test_slurm_names_a_folder_that_is_not_a_checkout(allocation: Callable, tmp_path: Path) -> None:
    done = allocation(folder=tmp_path / "bin")
    assert done.returncode == 1 and "is not a checkout" in done.stderr


# -- the speedrun


def test_the_speedrun_runs_every_stage_of_the_pipeline_in_an_order_that_works(tmp_path: Path) -> None:
    """Python is a program that notes how it is called and has no DVC."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@" >> calls\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([INFRA / "speedrun.sh", "a root"], cwd=tmp_path, env=env, check=True, capture_output=True)
    calls = [line.removeprefix("-m pipelines ") for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[:2] == ["profile speedrun --root a root", "check"] and calls[-1] == "summary"
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = profile("speedrun")
    wanted = []
    for name, stage in pipeline.items():
        entries = {"${variants}": [*params.variants], "${baselines}": [*params.baselines]}
        keys = entries.get(stage.get("foreach"), [""])
        command = stage.get("do", stage)["cmd"].removeprefix("python -m pipelines ")
        wanted += [command.replace("${key}", key) for key in keys]
        assert name in command
    assert calls[2:-1] == wanted  # dvc.yaml lists stages after what they need
    times = (tmp_path / "reports" / "speedrun.txt").read_text().splitlines()
    assert len(times) == len(wanted) + 1 and times[-1].split()[0] == "total"


def test_a_speedrun_that_was_cut_adds_to_its_times(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    program, env = tmp_path / "python", os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\n[ "$3" != profile ] || echo "$4" > params.yaml\n')
    program.chmod(0o755)
    sums = []
    for before in ("speedrun", "speedrun-128"):  # cut under these settings
        (tmp_path / "params.yaml").write_text(f"{before}\n")
        (tmp_path / "reports" / "speedrun.txt").write_text("ingest 500 s\ntrain@full 7000 s\ntrain@full 30 s\n")
        subprocess.run([INFRA / "speedrun.sh", "root"], cwd=tmp_path, env=env, check=True, capture_output=True)
        times = dict(line.split()[:2] for line in (tmp_path / "reports" / "speedrun.txt").read_text().splitlines())
        sums.append((int(times["train@full"]) // 10, int(times["total"]) // 10))
    assert sums == [(703, 753), (0, 0)]
