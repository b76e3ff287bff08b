"""The cluster for real: a Ray head that computes nothing and two nodes, an S3 server, jobs over HTTP, real DVC.

"Laptop" below is a fresh copy of the project with its own environment; the cluster's environment is another one, and
storage is the only thing they share. Jobs run at S3 with the cluster's credentials, the cluster asks for a token, and
neither may travel.
"""

import contextlib
import csv
import json
import re
import secrets
import shutil
import signal
import subprocess
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.job_submission import JobStatus

from pbe.store import Store, load_manifest
from tests.pipelines.project import Project, kill_tree, make_project
from tests.pipelines.ray_nodes import Nodes, children, ray_nodes, token_env

STEP_S = 400  # no command below takes longer, on a machine that does other work beside; 60 on an idle one

CHANGES = """
    ingest: {shards: 3}
    encode: {actors: 1}
    train: {steps: 300, checkpoint_every: 30, validate_every: 150, log_every: 10}
    bench: {max_items: 12}
    edit: {steps: 2, holes: [box], references: [exemplar], items_per_unit: 12, actors: 1}
    evaluate: {extractors: [{kind: efficientnet_lite0}], quality_components: 1, quality_pca_dims: 2, actors: 1}
    sweep: {guidance_scales: [1, 3], items: 8, diversity: {items: 2, seeds: [1, 2]}}
"""


@dataclass(frozen=True)
class Cluster:
    nodes: Nodes
    s3_address: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    address = "http://{}:{}".format(*s3.get_host_and_port())
    with ray_nodes(s3_env(address, "cluster"), cpus=[2, 2]) as nodes:
        yield Cluster(nodes, address)
    s3.stop()


def s3_env(address: str, who: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": who,
        "AWS_SECRET_ACCESS_KEY": f"secret-of-{who}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass(frozen=True)
class Laptop:
    """A copy of the project, and the environment in which its commands run."""

    project: Project
    env: dict[str, str]

    @property
    def root(self) -> Path:
        return self.project.folder

    def run(self, *args: str, expect: int = 0) -> str:
        """Of `python -m pipelines ARGS`: what it said."""
        done = self.project.run("pipelines", *args, check=False, **self.env)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *args: str) -> "subprocess.Popen[bytes]":
        return self.project.start("pipelines", *args, **self.env)

    def said(self) -> str:
        """By what `start` has started."""
        return self.project.started_log()

    def manifest(self, stage: str) -> dict:
        return json.loads((self.root / "data" / stage / "manifest.json").read_text())


@pytest.fixture
def laptop(cluster: Cluster, tmp_path: Path) -> Laptop:
    return new_laptop(cluster, small_project(tmp_path / "a laptop"))


def new_laptop(cluster: Cluster, project: Project) -> Laptop:
    """Its storage is a bucket of its own."""
    bucket = f"pbe-{secrets.token_hex(4)}"
    boto3.client(
        "s3", endpoint_url=cluster.s3_address, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    ).create_bucket(Bucket=bucket)
    env = {
        **s3_env(cluster.s3_address, "laptop"),
        **token_env(cluster.nodes.token),
        "RAY_ADDRESS": cluster.nodes.address,
        "PBE_STORAGE": f"s3://{bucket}/pre/fix",
    }
    return Laptop(project, env)


def small_project(folder: Path) -> Project:
    project = make_project(folder)
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    for stage, changes in yaml.safe_load(textwrap.dedent(CHANGES)).items():
        params[stage] |= changes
    params |= {"variants": {"full": {}}, "baselines": {"copy_paste": {"kind": "copy_paste"}}}
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params))
    project.git("commit", "-qam", "small")
    return project


@pytest.fixture
def bucket(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The laptop's storage, opened by the test."""
    for name, value in laptop.env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return Store(laptop.env["PBE_STORAGE"])


def wait_for(found: Callable[[], object], process: "subprocess.Popen[bytes]", laptop: Laptop, what: str) -> None:
    deadline = time.monotonic() + STEP_S
    while not found():
        assert process.poll() is None, f"ended before {what}:\n{laptop.said()}"
        assert time.monotonic() < deadline, f"no {what}:\n{laptop.said()}"
        time.sleep(0.1)


def stub(laptop: Laptop, body: str) -> None:
    """Replace what materialize does; everything around it stays. Another body is another VERSION, hence another job."""
    lines = [
        "import json, os, sys, time",
        "from pathlib import Path",
        f"VERSION = {zlib.crc32(body.encode())}",
        "def main(stage):",
        *(f"    {line}" for line in textwrap.dedent(body).strip().splitlines()),
    ]
    (laptop.root / "pipelines" / "materialize.py").write_text("\n".join(lines) + "\n")


# -- one job -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # with the cluster's own start
def test_what_a_job_sees_and_what_comes_back(cluster: Cluster, laptop: Laptop, bucket: Store) -> None:
    (laptop.root / ".env").write_text("TOKEN=laptop")
    (laptop.root / "models" / "full" / "unet").mkdir(parents=True)
    (laptop.root / "models" / "full" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    stub(
        laptop,
        """
        import ray
        from pipelines.runtime.parts import start_ray
        start_ray()
        in_worker = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        seen = {
            "files": sorted(str(path) for path in Path().rglob("*") if path.is_file()),
            "driver": dict(os.environ),
            "worker": in_worker,
        }
        stage.outputs.mkdir(parents=True)
        (stage.outputs / "manifest.json").write_text(json.dumps(seen))
        (stage.outputs / "counts.json").write_text("{}")
        print("materialize: a line of the job's log")
        print("a line of a library")
        """,
    )
    said = laptop.run("materialize").splitlines()
    [log] = (laptop.root / "logs" / "materialize").glob("*.log")
    assert "materialize: a line of the job's log" in said and "a line of a library" not in said
    assert "a line of a library" in log.read_text().splitlines()
    seen = laptop.manifest("materialize")
    assert {"params.yaml", "pipelines/runtime/parts.py", "pbe/store.py"} <= set(seen["files"])
    assert not [name for name in seen["files"] if name.startswith((".env", ".git", "models", "tests"))]
    for env in (seen["driver"], seen["worker"]):
        assert env["AWS_SECRET_ACCESS_KEY"] == "secret-of-cluster"
        assert env["PBE_STORAGE"] == laptop.env["PBE_STORAGE"]
        assert env["NO_ALBUMENTATIONS_UPDATE"] == "1"
    assert (laptop.root / "data" / "materialize" / "counts.json").exists()

    # a finished job is taken over; when its outputs are gone, Ray gets a new id
    (laptop.root / "data" / "materialize" / "manifest.json").unlink()
    assert "finished earlier" in laptop.run("materialize")
    assert laptop.manifest("materialize") == seen
    bucket.delete_tree("jobs")
    assert "submitted job" in laptop.run("materialize")
    attempts = [job.submission_id for job in cluster.nodes.jobs() if "materialize" in str(job.submission_id)]
    assert sorted(str(attempt)[-2:] for attempt in attempts) == ["-1", "-2"]
    told = json.dumps([job.runtime_env for job in cluster.nodes.jobs()])
    assert "secret-of-laptop" not in told
    assert cluster.nodes.token not in told


@pytest.mark.slow
def test_a_failed_job_is_one_error_with_its_log(laptop: Laptop) -> None:
    stub(laptop, "from pipelines.runtime.stage import StageError; raise StageError('no photo fits')")
    said = laptop.run("materialize", expect=1)
    error = said[said.index("pbe: error: job pbe-materialize-") :]
    assert "is FAILED" in error.splitlines()[0]
    assert "    pbe: error: no photo fits" in error.splitlines()
    assert "Traceback" not in said
    assert not (laptop.root / "data" / "materialize").exists()


@pytest.mark.slow
def test_a_job_whose_driver_is_killed_is_one_error_and_the_same_command_tries_again(
    cluster: Cluster, laptop: Laptop
) -> None:
    stub(laptop, "print('materialize: waiting'); time.sleep(600)")
    process = laptop.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in laptop.said(), process, laptop, "line of the job")
    job_id = next(word for word in laptop.said().split() if word.startswith("pbe-materialize-"))
    driver_of(cluster, job_id).kill()
    assert process.wait(timeout=STEP_S) == 1, laptop.said()
    assert f"pbe: error: job {job_id} is FAILED" in laptop.said() and "Traceback" not in laptop.said()
    assert not (laptop.root / "data" / "materialize").exists()
    process = laptop.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in laptop.said(), process, laptop, "line of the job")
    again = f"{job_id.removesuffix('-1')}-2"
    assert f"submitted job {again}" in laptop.said()
    cluster.nodes.client().stop_job(again)
    assert process.wait(timeout=STEP_S) == 1, laptop.said()
    assert f"pbe: error: job {again} is STOPPED" in laptop.said()


def driver_of(cluster: Cluster, job_id: str) -> psutil.Process:
    """The python that runs the stage, not the shell that Ray starts it with."""
    of_nodes = [process for node in cluster.nodes.running for process in children(node)]
    return next(p for p in of_nodes if p.name().startswith("python") and p.cmdline()[-2:] == ["--as-job", job_id])


@pytest.mark.slow
def test_ctrl_c_detaches_and_the_same_command_attaches_again(laptop: Laptop, tmp_path: Path) -> None:
    go = tmp_path / "go"
    stub(
        laptop,
        f"""
        print("materialize: waiting")
        deadline = time.monotonic() + {STEP_S}
        while not Path({str(go)!r}).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stage.outputs.mkdir(parents=True)
        (stage.outputs / "manifest.json").write_text(json.dumps({{"job": sys.argv[-1]}}))
        """,
    )
    first = laptop.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in laptop.said(), first, laptop, "line of the job")
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=STEP_S) == 130, laptop.said()
    job_id = next(word for word in laptop.said().split() if word.startswith("pbe-materialize-"))
    assert f"ray job stop --address {laptop.env['RAY_ADDRESS']} {job_id}" in laptop.said()

    second = laptop.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in laptop.said(), second, laptop, "line of the job")
    assert f"attached again to job {job_id}" in laptop.said()

    # somebody else runs the same, in a checkout of theirs
    colleague = Laptop(Project(tmp_path / "another laptop"), laptop.env)
    shutil.copytree(laptop.root, colleague.root, symlinks=True)
    third = colleague.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in colleague.said(), third, colleague, "line of the job")
    assert f"attached again to job {job_id}" in colleague.said()

    go.touch()
    for whose, process in ((laptop, second), (colleague, third)):
        assert process.wait(timeout=STEP_S) == 0, whose.said()
        assert whose.manifest("materialize") == {"job": job_id}


@pytest.mark.slow
def test_a_second_ctrl_c_stops_the_job_and_the_same_command_tries_again(cluster: Cluster, laptop: Laptop) -> None:
    stub(laptop, "print('materialize: waiting'); time.sleep(600)")
    process = laptop.start("materialize")
    wait_for(lambda: "\nmaterialize: waiting\n" in laptop.said(), process, laptop, "line of the job")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in laptop.said(), process, laptop, "offer")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=STEP_S) == 130, laptop.said()
    job_id = next(word for word in laptop.said().split() if word.startswith("pbe-materialize-"))
    assert f"job {job_id} is STOPPED" in laptop.said()
    assert cluster.nodes.client().get_job_status(job_id) == JobStatus.STOPPED
    stub(laptop, "stage.outputs.mkdir(parents=True); (stage.outputs / 'manifest.json').write_text('{}')")
    assert "submitted job" in laptop.run("materialize")


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_ray_than_the_clusters_is_one_clear_error(laptop: Laptop) -> None:
    working_dir = laptop.root / "pipelines" / "cluster" / "working_dir.py"
    working_dir.write_text(
        working_dir.read_text().replace("json.dumps(versions_here())", 'json.dumps({"ray": "2.9.0"})')
    )
    said = laptop.run("ingest", expect=1)
    assert "here and 2.9.0 there" in said and "requirements.lock" in said


@pytest.mark.slow
def test_storage_of_one_node_alone_is_one_clear_error(laptop: Laptop, tmp_path: Path) -> None:
    """All nodes are on this machine; what another one does not see is played by a path that is its own folder."""
    job_entry = laptop.root / "pipelines" / "cluster" / "job_entry.py"
    job_entry.write_text(
        job_entry.read_text().replace("store = Store(uri)", f"store = Store({str(tmp_path / 'other')!r})")
    )
    said = laptop.run("ingest", expect=1)
    assert re.search(r"does not work on node \S+: it does not see what another node wrote there", said)
    assert not (laptop.root / "data" / "ingest").exists()


# -- all of it -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 524 on two cores
def test_dvc_repro_on_a_cluster_that_loses_nodes_makes_what_a_local_run_makes(
    cluster: Cluster, laptop: Laptop, bucket: Store, tmp_path: Path
) -> None:
    local = small_project(tmp_path / "local")
    for project in (laptop.project, local):
        project.edit_params("slots: 4", "slots: 200")  # work enough for a node to die in it

    # a node dies in materialize
    process = laptop.project.start("dvc", "repro", "materialize", **laptop.env)
    wait_for(lambda: parts(bucket, "materialize"), process, laptop, "finished part")
    cluster.nodes.kill(cluster.nodes.running[-1])
    assert process.wait(timeout=STEP_S) == 0, laptop.said()
    cluster.nodes.add(cpus=2)
    cluster.nodes.wait_for(alive=3)
    local.run("dvc", "repro", "materialize")
    assert laptop.manifest("materialize") == json.loads((local.folder / "data/materialize/manifest.json").read_text())
    for project in (laptop.project, local):
        project.edit_params("slots: 200", "slots: 4")
    laptop.project.run("dvc", "repro", "materialize", check=True, **laptop.env)

    # no GPU where one is asked for
    laptop.project.edit_params("gpus: 0", "gpus: 1")
    said = laptop.run("encode", expect=1)
    assert "encode.actors: 1, encode.per_actor: 0.5 CPUs, 1 GPUs, 1.0 GiB of memory" in said
    assert "does not fit on 3 nodes with" in said and "Traceback" not in said
    laptop.project.edit_params("gpus: 1", "gpus: 0")

    # what `rayjob` gives to KubeRay, given to this cluster by hand
    manifest = yaml.safe_load(rayjob(laptop, "encode"))
    job_id = cluster.nodes.client().submit_job(
        entrypoint=manifest["spec"]["entrypoint"],
        submission_id=manifest["metadata"]["name"],
        runtime_env=yaml.safe_load(manifest["spec"]["runtimeEnvYAML"]),
    )
    deadline = time.monotonic() + STEP_S
    while not (status := cluster.nodes.client().get_job_status(job_id)).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status == JobStatus.SUCCEEDED, cluster.nodes.client().get_job_logs(job_id)
    assert f"job {job_id} finished earlier" in laptop.run("encode")

    # the laptop is switched off while training begins, and a node with ranks of it dies later
    process = laptop.project.start("dvc", "repro", **laptop.env)
    wait_for(lambda: "submitted job pbe-train-full-" in laptop.said(), process, laptop, "training")
    kill_tree(process)
    laptop.project.run("pipelines", "check", check=True, **laptop.env)  # as `make repro` does
    process = laptop.project.start("dvc", "repro", **laptop.env)
    wait_for(lambda: "attached again to job pbe-train-full-" in laptop.said(), process, laptop, "attachment")
    wait_for(lambda: checkpoints(bucket), process, laptop, "checkpoint")
    (at_work,) = [node for node in cluster.nodes.running if trains(node)]
    cluster.nodes.kill(at_work)
    assert process.wait(timeout=2 * STEP_S) == 0, laptop.said()
    assert "resuming from step" in laptop.said()
    cluster.nodes.add(cpus=2)

    local.run("dvc", "repro", "train@full")
    for stage in ("materialize", "encode"):
        theirs = json.loads((local.folder / "data" / stage / "manifest.json").read_text())
        assert laptop.manifest(stage) == theirs
        for unit in load_manifest(laptop.root / "data" / stage / "manifest.json").units:
            for file in unit.files:
                assert sha256(bucket.read_bytes(file.path)).hexdigest() == file.sha256
    assert losses(laptop.project) == pytest.approx(losses(local), rel=1e-5)
    assert list((laptop.root / "models" / "full").rglob("*.safetensors"))
    assert "frechet" in (laptop.root / "data" / "evaluate" / "metrics.json").read_text()
    assert (laptop.root / "reports" / "index.html").is_file()
    assert "up to date" in laptop.project.run("dvc", "repro", check=True, **laptop.env).stdout


@pytest.mark.drill
@pytest.mark.timeout(7200)
def test_the_whole_sample_profile_through_the_bridge(cluster: Cluster, tmp_path: Path) -> None:
    """All variants, extractors and sweeps, as `make repro` runs them; only the environment names the cluster."""
    laptop = new_laptop(cluster, make_project(tmp_path / "a laptop", profile="sample"))
    process = laptop.project.start("dvc", "repro", **laptop.env)
    assert process.wait(timeout=6000) == 0, laptop.said()
    local = make_project(tmp_path / "local", profile="sample")
    process = local.start("dvc", "repro", "train@full")
    assert process.wait(timeout=3 * STEP_S) == 0, local.started_log()

    for stage in ("ingest", "filter", "materialize", "encode"):
        assert laptop.manifest(stage) == json.loads((local.folder / "data" / stage / "manifest.json").read_text())
    assert losses(laptop.project) == pytest.approx(losses(local), rel=1e-5)
    scores = json.loads((laptop.root / "data" / "evaluate" / "metrics.json").read_text())
    params = yaml.safe_load((laptop.root / "params.yaml").read_text())
    for name in [*params["variants"], *params["baselines"]]:
        assert name in scores
    assert (laptop.root / "reports" / "index.html").is_file()
    assert "up to date" in laptop.project.run("dvc", "repro", check=True, **laptop.env).stdout
    jobs = [str(job.submission_id) for job in cluster.nodes.jobs()]
    for name in params["variants"]:
        assert any(job.startswith(f"pbe-train-{name}-") and job.endswith("-1") for job in jobs)


def rayjob(laptop: Laptop, stage: str) -> str:
    env = {**laptop.env, "MLFLOW_TRACKING_URI": "http://mlflow.example:5000"}  # this stage does not ask it
    return laptop.project.run("pipelines", "rayjob", stage, check=True, **env).stdout


def parts(bucket: Store, stage: str) -> list[str]:
    """Names of finished ones."""
    units = bucket.list_names(f"parts/{stage}")
    return [unit for unit in units if bucket.exists(f"parts/{stage}/{unit}/record.json")]


def checkpoints(bucket: Store) -> list[str]:
    return [path for path in bucket.list_files("runs") if path.endswith("COMPLETE.json")]


def trains(node: "subprocess.Popen[bytes]") -> bool:
    names = []
    for process in children(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.cmdline())
    return any("RayTrainWorker" in " ".join(name) for name in names)


def losses(project: Project) -> list[float]:
    with (project.folder / "data" / "train" / "full" / "loss.csv").open() as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]
