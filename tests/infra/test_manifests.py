"""The cluster recipes of infra/, offline: KubeRay manifests, launcher file, Slurm script, against their tools' schemas.

What each must be is said by a function that lists what is wrong with it. It finds nothing in the committed file, and
finds each of the mistakes put into a copy.
"""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from pbe.config import Params
from pipelines.cluster.working_dir import job_env
from pipelines.runtime.capacity import Bundle, Demand, fits, ray_resources
from pipelines.runtime.stage import CLUSTER_STAGES, open_stage
from tests.profiles import NAMES, profile

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
CLUSTER = yaml.safe_load((INFRA / "kuberay" / "raycluster.yaml").read_text())
JOB = yaml.safe_load((INFRA / "kuberay" / "rayjob.yaml").read_text())
LAUNCHER = yaml.safe_load((INFRA / "ray-cluster-aws.yaml").read_text())
PROFILES = {name: profile(name) for name in NAMES}

KUBERNETES = "1.33"  # whose schema pods are checked against
(RAY,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
RAY_OPTIONS = {option for parameter in ray_start.params for option in parameter.opts}
HEAD_ONLY = {"--port", "--redis-shard-ports", "--include-dashboard"}  # `ray start` refuses them elsewhere
GIB = 1 << 30


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a/b/0/c; None takes the key away."""
    out = copy.deepcopy(document)
    *parents, last = path.split("/")
    at: Any = out
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is None:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return out


# -- KubeRay -------------------------------------------------------------------------------------------------


def kuberay_problems(manifest: dict[str, Any]) -> list[str]:
    schema = yaml.safe_load((Path(__file__).parent / "kuberay.schema.json").read_text())
    kind = {"RayCluster": "rayCluster", "RayJob": "rayJob"}[manifest["kind"]]  # oneOf would only say "neither"
    validator = jsonschema.Draft202012Validator(schema | {"oneOf": [{"$ref": f"#/$defs/{kind}"}]})
    problems = [error.message for branch in validator.iter_errors(manifest) for error in branch.context or [branch]]
    if problems:
        return problems
    spec = manifest["spec"] if kind == "rayCluster" else manifest["spec"]["rayClusterSpec"]
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    problems += [problem for group in (head, *workers) for problem in pod_problems(group["template"])]
    if problems:
        return problems
    for group in (head, *workers):
        problems += [f"ray start has no --{key}" for key in group["rayStartParams"] if f"--{key}" not in RAY_OPTIONS]
        problems += memory_problems(group)
    if kind == "rayJob":
        problems += pod_problems(manifest["spec"]["submitterPodTemplate"])
        problems += job_problems(manifest["spec"])
    options = spec["autoscalerOptions"]
    sidecar = {key: options[key] for key in ("resources", "securityContext", "imagePullPolicy")}
    problems += pod_errors({"containers": [{"name": "autoscaler", "image": "x:1", **sidecar}]})
    images = [c["image"] for group in (head, *workers) for c in group["template"]["spec"]["containers"]]
    problems += [problem for image in images for problem in image_problems(image)]
    for wanted, holds in {
        f"rayVersion is {RAY}": spec["rayVersion"] == RAY,
        "the cluster wants a token": spec["authOptions"]["mode"] == "token",
        "the dashboard stays in the cluster": head["serviceType"] == "ClusterIP" and not head.get("enableIngress"),
        "the head runs no tasks": head["rayStartParams"].get("num-cpus") == "0",
        "autoscaler v2": spec["enableInTreeAutoscaling"] and options["version"] == "v2",
        "idle pools have no pods": all(group["minReplicas"] == group["replicas"] == 0 for group in workers),
        "GPU pods have the CUDA image": all(("-cuda" in _image(g)) == bool(_resources(g)[1]) for g in workers),
    }.items():
        if not holds:
            problems.append(f"not so: {wanted}")
    return problems


def pod_problems(template: dict[str, Any]) -> list[str]:
    """Kubernetes' own schema, then what we want of every pod."""
    spec = template["spec"]
    problems = pod_errors(spec)
    if problems:
        return problems
    security = spec.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("runAsUser") == 1000):
        problems.append("runs as root, or not as the image's user")
    for container in spec["containers"]:
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            problems.append(f"{container['name']}: may escalate its privileges")
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() & resources.get("limits", {}).keys():
            problems.append(f"{container['name']}: no requests and limits of cpu and memory")
        for variable in container.get("env", ()):
            if re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]) and "value" in variable:
                problems.append(f"{container['name']}: {variable['name']} is written out")
    return problems


def pod_errors(spec: dict[str, Any]) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    try:
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}"]
    return []


def memory_problems(group: dict[str, Any]) -> list[str]:
    """The object store lies in /dev/shm, a volume in memory, and that in the pod's memory."""
    spec = group["template"]["spec"]
    shm = next((v["emptyDir"] for v in spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"), None)
    mounts = {mount["mountPath"] for mount in spec["containers"][0].get("volumeMounts", ())}
    if shm is None or "/dev/shm" not in mounts:
        return ["no /dev/shm in memory"]
    limits = spec["containers"][0]["resources"]["limits"]
    sizes = [int(group["rayStartParams"].get("object-store-memory", 0)), _bytes(shm["sizeLimit"])]
    return [] if sizes[0] <= sizes[1] <= _bytes(limits["memory"]) / 2 else [f"{sizes} do not fit {limits['memory']}"]


def job_problems(spec: dict[str, Any]) -> list[str]:
    problems = []
    words = spec["entrypoint"].split()
    if words[:3] != ["python", "-m", "pipelines"] or words[3] not in CLUSTER_STAGES or words[-2] != "--as-job":
        problems.append(f"entrypoint {spec['entrypoint']} is not what jobs.entrypoint gives")
    runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    if runtime_env.keys() != {"working_dir", "env_vars"}:
        problems.append(f"runtimeEnvYAML has {sorted(runtime_env)}")
    elif not re.fullmatch(r"s3://.+\.zip", runtime_env["working_dir"]):
        problems.append("working_dir is no zip that every node can read")
    elif unknown := runtime_env["env_vars"].keys() - job_env(open_stage("materialize"), "job-1").keys():
        problems.append(f"a job gets no {sorted(unknown)}")
    elif wrong := [key for key, value in runtime_env["env_vars"].items() if not isinstance(value, str)]:
        problems.append(f"Ray takes strings alone as values: {wrong}")
    if not spec.get("shutdownAfterJobFinishes") or "activeDeadlineSeconds" not in spec:
        problems.append("a cluster may be left that nobody needs")
    return problems


def image_problems(image: str) -> list[str]:
    found = re.search(r":ray([0-9.]+)-(cpu|cuda)$", image)
    return [] if found and found[1] == RAY else [f"{image}: not of Ray {RAY}, the pin of requirements.lock"]


def _image(group: dict[str, Any]) -> str:
    return group["template"]["spec"]["containers"][0]["image"]


def _resources(group: dict[str, Any]) -> tuple[float, int]:
    """CPUs and GPUs that Ray finds in one pod."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return float(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))


def memory_limit(group: dict[str, Any]) -> str:
    """What KubeRay tells Ray of one pod's memory."""
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]


def _bytes(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity.removesuffix("Gi")) * GIB


@pytest.mark.parametrize("manifest", [CLUSTER, JOB], ids=["raycluster", "rayjob"])
def test_kuberay_manifests(manifest: dict[str, Any]) -> None:
    assert kuberay_problems(manifest) == []


def test_a_job_gets_the_cluster_of_the_other_manifest() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


WORKER_POD = "workerGroupSpecs/1/template/spec"
CLUSTER_MISTAKES = [
    ("spec/rayVersoin", "2.60.0", "rayVersoin"),
    ("spec/rayVersion", "2.59.0", "rayVersion is"),
    ("metadata/name", "pbe_cluster", "does not match"),
    ("spec/authOptions/mode", "disabled", "wants a token"),
    ("spec/authOptions/mode", "Token", "is not one of"),
    ("spec/autoscalerOptions/version", "v3", "is not one of"),
    ("spec/autoscalerOptions/resources/limits", ["cpu"], "resources/limits"),
    ("spec/headGroupSpec/serviceType", "LoadBalancer", "stays in the cluster"),
    ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "is not of type 'string'"),
    ("spec/headGroupSpec/rayStartParams/num-cpus", "4", "runs no tasks"),
    ("spec/headGroupSpec/rayStartParams/num_cpus", "0", "no --num_cpus"),
    ("spec/workerGroupSpecs/0/minReplicas", 1, "no pods"),
    ("spec/workerGroupSpecs/0/maxReplicas", None, "maxReplicas"),
    (f"spec/{WORKER_POD}/tolerations/0/efect", "NoSchedule", "efect"),
    (f"spec/{WORKER_POD}/containers/0/envForm", [], "envForm"),
    (f"spec/{WORKER_POD}/containers/0/image", "registry.example.com/pbe:ray2.59.0-cuda", "not of Ray"),
    (f"spec/{WORKER_POD}/containers/0/image", f"registry.example.com/pbe:ray{RAY}-cpu", "CUDA image"),
    (f"spec/{WORKER_POD}/containers/0/image", "registry.example.com/pbe", "not of Ray"),
    (f"spec/{WORKER_POD}/containers/0/resources/limits", None, "no requests and limits"),
    (f"spec/{WORKER_POD}/containers/0/env", [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}], "written out"),
    (f"spec/{WORKER_POD}/securityContext/runAsUser", 0, "root"),
    (f"spec/{WORKER_POD}/volumes/0/emptyDir/medium", "", "no /dev/shm"),
    (f"spec/{WORKER_POD}/volumes/0/emptyDir/sizeLimit", "1Gi", "do not fit"),
]
JOB_MISTAKES = [
    ("spec/activeDeadlineSeconds", 0, "minimum"),
    ("spec/activeDeadlineSeconds", None, "nobody needs"),
    ("spec/backOffLimit", 1, "backOffLimit"),
    ("spec/submissionMode", "K8SJobMode", "is not one of"),
    ("spec/shutdownAfterJobFinishes", False, "True was expected"),
    ("spec/clusterSelector", {"ray.io/cluster": "pbe"}, "valid under each"),
    ("spec/entrypoint", "python -m pipelines report --as-job x", "is not what jobs.entrypoint gives"),
    ("spec/runtimeEnvYAML", "working_dir: .\nenv_vars: {}", "every node can read"),
    ("spec/runtimeEnvYAML", "working_dir: s3://b/p.zip\nenv_vars: {AWS_SECRET_ACCESS_KEY: x}", "a job gets no"),
    ("spec/runtimeEnvYAML", "working_dir: s3://b/p.zip\nenv_vars: {PBE_STORAGE: 1}", "strings alone"),
    ("spec/submitterPodTemplate/spec/restartPolicies", "Never", "restartPolicies"),
]


@pytest.mark.parametrize(("path", "value", "told"), CLUSTER_MISTAKES)
def test_a_mistake_in_the_cluster_is_found(path: str, value: Any, told: str) -> None:
    assert told in " ".join(kuberay_problems(changed(CLUSTER, path, value)))


@pytest.mark.parametrize(("path", "value", "told"), JOB_MISTAKES)
def test_a_mistake_in_the_job_is_found(path: str, value: Any, told: str) -> None:
    assert told in " ".join(kuberay_problems(changed(JOB, path, value)))


# -- the launcher --------------------------------------------------------------------------------------------


def launcher_problems(config: dict[str, Any]) -> list[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))  # with the defaults that `ray up` adds
    except Exception as error:
        return [f"ray up: {error}"]
    kinds = config["available_node_types"]
    head = kinds[config["head_node_type"]]
    workers = [kind for kind in kinds.values() if kind is not head]
    images = [config["docker"]["image"], *(k["docker"]["worker_image"] for k in workers if "docker" in k)]
    problems = [problem for image in images for problem in image_problems(image)]
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    problems += [
        f"ray start has no {option}" for option in re.findall(r"--[a-z-]+", starts) if option not in RAY_OPTIONS
    ]
    for wanted, holds in {
        "the dashboard is on the head's loopback": "--dashboard-host=127.0.0.1" in starts and "0.0.0.0" not in starts,
        "the head runs no tasks": head["resources"] == {"CPU": 0} and "--num-cpus=0" in starts,
        "the head is not on spot": "InstanceMarketOptions" not in head["node_config"],
        "workers are": all(k["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for k in workers),
        "there are none without work": all(kind["min_workers"] == 0 for kind in workers),
        "nothing is copied to the nodes": not config["file_mounts"] and not config["cluster_synced_files"],
        "nodes have a role": all("IamInstanceProfile" in kind["node_config"] for kind in kinds.values()),
        "no other Ray is installed": not config["setup_commands"],
        "ssh is not open to everybody": "0.0.0.0/0" not in str(config["provider"]),
        "GPU nodes have the CUDA image": all(
            ("GPU" in kind["resources"]) == kind.get("docker", {}).get("worker_image", "").endswith("-cuda")
            for kind in workers
        ),
    }.items():
        if not holds:
            problems.append(f"not so: {wanted}")
    return problems


def test_launcher_file() -> None:
    assert launcher_problems(LAUNCHER) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("max_worker", 2, "max_worker"),
        ("max_workers", "many", "is not of type 'integer'"),
        ("head_node_type", "haed", "head_node_type"),
        ("docker/imaeg", "x", "imaeg"),
        ("docker/image", "registry.example.com/pbe:latest", "not of Ray"),
        ("available_node_types/gpu/resources/GPU", -1, "minimum"),
        ("available_node_types/gpu/min_workers", 1, "none without work"),
        ("available_node_types/gpu/docker/worker_image", f"registry.example.com/pbe:ray{RAY}-cpu", "CUDA image"),
        ("available_node_types/cpu/node_config/IamInstanceProfile", None, "have a role"),
        ("available_node_types/head/node_config/InstanceMarketOptions", {"MarketType": "spot"}, "not on spot"),
        ("file_mounts", {"~/.aws/credentials": "~/.aws/credentials"}, "nothing is copied"),
        ("setup_commands", ["pip install ray"], "no other Ray"),
        ("head_start_ray_commands", ["ray start --head --num-cpus=0 --dashboard-host=0.0.0.0"], "loopback"),
        ("worker_start_ray_commands", ["ray start --adress=$RAY_HEAD_IP:6379"], "no --adress"),
        ("provider/security_group/IpPermissions/0/IpRanges/0/CidrIp", "0.0.0.0/0", "everybody"),
    ],
)
def test_a_mistake_in_the_launcher_file_is_found(path: str, value: Any, told: str) -> None:
    assert told in " ".join(launcher_problems(changed(LAUNCHER, path, value)))


# -- what the stages ask for ---------------------------------------------------------------------------------


def demands(params: Params) -> dict[str, Demand]:
    """What every stage holds at once, of tasks one alone: they may wait for each other."""
    tasks = {name: Demand(getattr(params, name).per_bucket, name) for name in ("ingest", "materialize")}
    actors = {name: getattr(params, name) for name in ("encode", "edit", "evaluate")}
    held = {name: Demand(cfg.per_actor, name, cfg.actors) for name, cfg in actors.items()}
    return {**tasks, **held, "train": Demand(params.train.per_worker, "train", params.train.workers)}


def too_small(nodes: list[Bundle], params: Params, *, all_at_once: bool) -> list[str]:
    """Stages that a cluster of these nodes cannot run, or not with all their actors and ranks at once."""
    has_memory = all("memory" in node for node in nodes)  # where not: found by Ray when a node starts
    found = []
    for name, demand in demands(params).items():
        each = ray_resources(demand.each)
        if not fits(each if has_memory else _without_memory(each), demand.count if all_at_once else 1, nodes):
            found.append(name)
    return found


def _without_memory(bundle: Bundle) -> Bundle:
    return {name: amount for name, amount in bundle.items() if name != "memory"}


POOLS: dict[str, list[Bundle]] = {
    "kuberay": [
        {"CPU": cpus, "GPU": gpus, "memory": _bytes(memory_limit(group))}
        for group in CLUSTER["spec"]["workerGroupSpecs"]
        for cpus, gpus in [_resources(group)]
        for _ in range(group["maxReplicas"])
    ],
    "launcher": [
        {"CPU": kind["resources"]["CPU"], "GPU": kind["resources"].get("GPU", 0)}
        for name, kind in LAUNCHER["available_node_types"].items()
        if name != LAUNCHER["head_node_type"]
        for _ in range(kind["max_workers"])
    ],
}


@pytest.mark.parametrize("recipe", POOLS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_task_of_every_profile_fits_a_node(recipe: str, profile: str) -> None:
    assert too_small(POOLS[recipe], PROFILES[profile], all_at_once=False) == []


@pytest.mark.parametrize("recipe", POOLS)
@pytest.mark.parametrize("profile", ["openimages-8gpu", "openimages-mini", "coco"])
def test_the_pools_hold_what_these_profiles_run_at_once(recipe: str, profile: str) -> None:
    assert too_small(POOLS[recipe], PROFILES[profile], all_at_once=True) == []


def test_pools_that_are_too_small_are_found() -> None:
    params = PROFILES["openimages-8gpu"]
    cpu: Bundle = {"CPU": 8}
    gpu: Bundle = {"CPU": 8, "GPU": 1}
    slow: Bundle = {"CPU": 3, "GPU": 1}
    assert too_small([cpu] * 8, params, all_at_once=False) == ["encode", "edit", "evaluate", "train"]
    assert too_small([cpu, slow], params, all_at_once=False) == ["encode", "edit", "evaluate", "train"]
    assert too_small([cpu] + [gpu] * 7, params, all_at_once=True) == ["encode", "edit", "train"]
    assert too_small([{**gpu, "memory": 20 * GIB}], params, all_at_once=False) == ["train"]


# -- Slurm ---------------------------------------------------------------------------------------------------

SLURM = (INFRA / "slurm.sh").read_text()


def slurm_problems(text: str) -> list[str]:
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    problems = [parsed.stderr.strip()] if parsed.returncode else []
    command = re.search(r"ray symmetric-run (.*?) -- ", text.replace("\\\n", " "), re.DOTALL)
    if not command:
        return [*problems, "no `ray symmetric-run ... -- command`"]
    options = set(re.findall(r"--[a-z-]+", command[1])) - {"--address", "--min-nodes"}
    problems += [f"ray start has no {option}" for option in sorted(options - RAY_OPTIONS)]
    problems += [f"{option} is for a head alone" for option in sorted(options & (HEAD_ONLY | {"--head", "--block"}))]
    for directive in ("--ntasks-per-node=1", "--exclusive"):
        if f"#SBATCH {directive}\n" not in text:
            problems.append(f"no #SBATCH {directive}")
    return problems


def test_slurm_script() -> None:
    assert slurm_problems(SLURM) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("main() {", "main() {{", "syntax error"),
        ("    fi\n", "", "syntax error"),
        ("--num-cpus=", "--num-cpu=", "no --num-cpu"),
        ("--num-cpus=", "--include-dashboard=false --num-cpus=", "head alone"),
        ("ray symmetric-run --address", "ray symmetric --address", "no `ray symmetric-run"),
        ("#SBATCH --exclusive\n", "", "--exclusive"),
    ],
)
def test_a_mistake_in_the_slurm_script_is_found(old: str, new: str, told: str) -> None:
    assert old in SLURM
    assert told in " ".join(slurm_problems(SLURM.replace(old, new, 1)))


@pytest.fixture
def allocation(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs slurm.sh on one pretended node: srun runs its command here, `ray symmetric-run` what stands behind --."""
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
        script = shutil.copy(INFRA / "slurm.sh", tmp_path / "slurm_script")  # slurmd runs a copy elsewhere
        return subprocess.run(["bash", script, *arguments], env=variables, capture_output=True, text=True)

    return run


def test_slurm_runs_dvc_repro_on_the_cluster_of_its_nodes(allocation: Callable, tmp_path: Path) -> None:
    done = allocation("-s", "train@full")
    assert done.returncode == 0, done.stderr
    assert "auth token 600" in done.stdout and "address none" in done.stdout  # symmetric-run itself starts a cluster
    assert "ran repro -s train@full at 10.0.0.7:22424" in done.stdout
    assert [path.name for path in (tmp_path / ".store/slurm/4242424").iterdir()] == ["exit-code"]  # no token stays


@pytest.mark.parametrize(("how", "code", "told"), [({"dvc": 7}, 7, ""), ({"ray": False}, 1, "Ray did not start")])
def test_slurm_ends_as_dvc_does_and_fails_when_ray_does_not_start(
    allocation: Callable, how: dict[str, Any], code: int, told: str
) -> None:
    done = allocation("evaluate", **how)
    assert done.returncode == code and told in done.stderr


def test_slurm_names_a_folder_that_is_no_checkout(allocation: Callable, tmp_path: Path) -> None:
    done = allocation(folder=tmp_path / "bin")
    assert done.returncode == 1 and "is no checkout" in done.stderr
