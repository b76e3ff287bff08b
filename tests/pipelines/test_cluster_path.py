"""The cluster path for real: `ray start --head` on loopback, an S3 server on loopback, jobs submitted over HTTP.

"Laptop" below is a fresh copy of the project with its own environment; the cluster's environment is another one, and
storage is the only thing they share. Jobs run at S3 with the head's credentials, the cluster asks for a token, and
neither may travel.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.job_submission import JobDetails, JobSubmissionClient

from pbe.store import Store, load_manifest

REPOSITORY = Path(__file__).resolve().parents[2]
STEP_S = 240  # no command below takes longer

TINY = """
    ingest: {buckets: 2}
    materialize: {slots: 4}
    encode: {codec: {kind: patch, patch_px: 4, channels: 16, fit_crops: 20}, actors: 1}
    train: {steps: 4, batch: 4, micro_batch: 2, workers: 1, checkpoint_every: 2, log_every: 1}
    bench: {crops_per_box: 1, max_items: 12}
    edit: {steps: 2, holes: [box], references: [exemplar], batch_rows: 12, items_per_unit: 12, actors: 1}
    evaluate: {judges: [{kind: efficientnet_lite0}], quality_components: 1, quality_pca_dims: 2, resamples: 100,
               subsets: 20, batch_rows: 12, actors: 1}
"""


@dataclass(frozen=True)
class Cluster:
    address: str
    token: str
    s3: str  # address of the S3 server

    def jobs(self) -> list[JobDetails]:
        client = JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})
        return [job for job in client.list_jobs() if job.submission_id]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    folder = Path(tempfile.mkdtemp(prefix="pbe-ray-", dir="/tmp"))  # short: Ray's sockets are in there
    s3_address = "http://{}:{}".format(*s3.get_host_and_port())
    token = secrets.token_hex(16)
    dashboard, agent, client = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    flags = {
        "num-cpus": 4,
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "object-store-memory": 300_000_000,
        "temp-dir": folder,
    }
    # Ray's own head cannot start workers from an interpreter whose path has a space; ours may have one
    (folder / "venv").symlink_to(sys.prefix, target_is_directory=True)
    python = folder / "venv" / "bin" / Path(sys.executable).name
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in flags.items())],
            env={
                **plain_env(folder, python=python),
                **s3_env(s3_address, "cluster"),
                **token_env(token),
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else it waits 30 s for Ray Data's detached actors
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_up(f"{address}/api/version", token, head, folder / "head.log")
        yield Cluster(address, token, s3_address)
    finally:
        stop(head)
        s3.stop()
        shutil.rmtree(folder, ignore_errors=True)


def stop(head: subprocess.Popen) -> None:
    """By the ids of what was started here: `ray stop` would end everybody's Ray."""
    ours = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    try:
        head.wait(timeout=30)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_up(url: str, token: str, head: subprocess.Popen, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            problem: Exception = error
        except OSError as error:
            problem = error
        if head.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"ray start --head did not come up: {problem}\n{log.read_text()}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Free a moment ago: all are held open together, so they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def plain_env(home: Path, python: Path = Path(sys.executable)) -> dict[str, str]:
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def s3_env(address: str, who: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": who,
        "AWS_SECRET_ACCESS_KEY": f"secret-of-{who}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def token_env(token: str) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@dataclass(frozen=True)
class Laptop:
    """A copy of the project, and the environment in which its commands run."""

    root: Path
    env: dict[str, str]

    def start(self, *args: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *args],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, expect: int = 0) -> str:
        process = self.start(*args)
        try:
            output, _ = process.communicate(timeout=STEP_S)
        finally:
            process.kill()
        assert process.returncode == expect, output
        return output

    def manifest(self, stage: str) -> dict:
        return json.loads((self.root / "data" / stage / "manifest.json").read_text())


def copy_project(root: Path) -> Path:
    for name in ("pbe", "pipelines"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, root / name)
    params = yaml.safe_load((root / "params.yaml").read_text())
    for stage, changes in yaml.safe_load(textwrap.dedent(TINY)).items():
        params[stage] |= changes
    params["train"]["unet"] |= {"block_channels": [16, 32], "attention": [False, True]}
    params |= {"variants": {"full": {}}, "baselines": {"copy_paste": {"kind": "copy_paste"}}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


@pytest.fixture
def laptop(cluster: Cluster, tmp_path: Path) -> Laptop:
    """Its storage is a bucket of its own."""
    bucket = f"pbe-{secrets.token_hex(4)}"
    boto3.client(
        "s3", endpoint_url=cluster.s3, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    ).create_bucket(Bucket=bucket)
    env = {
        **plain_env(tmp_path),
        **s3_env(cluster.s3, "laptop"),
        **token_env(cluster.token),
        "RAY_ADDRESS": cluster.address,
        "PBE_STORAGE": f"s3://{bucket}/pre/fix",
    }
    return Laptop(copy_project(tmp_path / "a copy"), env)


@pytest.fixture
def bucket(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The laptop's storage, opened by the test."""
    for name, value in laptop.env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return Store(laptop.env["PBE_STORAGE"])


def stub(laptop: Laptop, body: str) -> None:
    """Replace what materialize does; everything around it stays."""
    lines = [
        "import json, os, sys, time",
        "from pathlib import Path",
        "def main(stage):",
        *(f"    {line}" for line in textwrap.dedent(body).strip().splitlines()),
    ]
    (laptop.root / "pipelines" / "materialize.py").write_text("\n".join(lines) + "\n")


# -- one job -------------------------------------------------------------------------------------------------


def test_what_a_job_sees_and_what_comes_back(cluster: Cluster, laptop: Laptop, bucket: Store) -> None:
    (laptop.root / ".env").write_text("TOKEN=laptop")
    (laptop.root / "models" / "full" / "unet").mkdir(parents=True)
    (laptop.root / "models" / "full" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    stub(
        laptop,
        """
        import ray
        from pipelines.units import start_ray
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
        print("a line of the job's log")
        """,
    )
    said = laptop.run("materialize")
    assert "a line of the job's log" in said.splitlines()
    seen = laptop.manifest("materialize")
    assert {"params.yaml", "pipelines/units.py", "pbe/store.py"} <= set(seen["files"])
    assert not [name for name in seen["files"] if name.startswith((".env", ".git", "models", "tests"))]
    for env in (seen["driver"], seen["worker"]):
        assert env["AWS_SECRET_ACCESS_KEY"] == "secret-of-cluster"
        assert env["PBE_STORAGE"] == laptop.env["PBE_STORAGE"]
        assert env["NO_ALBUMENTATIONS_UPDATE"] == "1"
    assert (laptop.root / "data" / "materialize" / "counts.json").exists()

    # a finished job is taken over; when its outputs are gone, Ray gets a new id
    (laptop.root / "data" / "materialize" / "manifest.json").unlink()
    assert "had finished before" in laptop.run("materialize")
    assert laptop.manifest("materialize") == seen
    bucket.delete_tree("jobs")
    assert "submitted job" in laptop.run("materialize")
    attempts = [job.submission_id for job in cluster.jobs() if "materialize" in str(job.submission_id)]
    assert sorted(str(attempt)[-2:] for attempt in attempts) == ["-1", "-2"]
    told = json.dumps([job.runtime_env for job in cluster.jobs()])
    assert "secret-of-laptop" not in told
    assert cluster.token not in told


def test_a_failed_job_is_one_error_with_its_log(laptop: Laptop) -> None:
    stub(laptop, "from pipelines.stage import StageError; raise StageError('no photo fits')")
    said = laptop.run("materialize", expect=1)
    error = said[said.index("pbe: error: job pbe-materialize-") :]
    assert "is FAILED" in error.splitlines()[0]
    assert "    pbe: error: no photo fits" in error.splitlines()
    assert "Traceback" not in said
    assert not (laptop.root / "data" / "materialize").exists()


def test_ctrl_c_detaches_and_the_same_command_attaches_again(laptop: Laptop, tmp_path: Path) -> None:
    go = tmp_path / "go"
    stub(
        laptop,
        f"""
        print("waiting")
        deadline = time.monotonic() + {STEP_S}
        while not Path({str(go)!r}).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stage.outputs.mkdir(parents=True)
        (stage.outputs / "manifest.json").write_text(json.dumps({{"job": sys.argv[-1]}}))
        """,
    )
    first = laptop.start("materialize")
    said = read_until(first, "waiting\n")
    first.send_signal(signal.SIGINT)
    rest, _ = first.communicate(timeout=STEP_S)
    job_id = next(word for word in said.split() if word.startswith("pbe-materialize-"))
    assert first.returncode == 130, rest
    assert f"ray job stop --address {laptop.env['RAY_ADDRESS']} {job_id}" in rest

    second = laptop.start("materialize")
    said = read_until(second, "waiting\n")
    assert f"attached again to job {job_id}" in said
    go.touch()
    rest, _ = second.communicate(timeout=STEP_S)
    assert second.returncode == 0, rest
    assert laptop.manifest("materialize") == {"job": job_id}


def read_until(process: subprocess.Popen, line: str) -> str:
    assert process.stdout is not None
    said = ""
    for each in process.stdout:  # ends with the process, which the job's own deadline bounds
        said += each
        if each == line:
            return said
    raise AssertionError(said)


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # 125 to 155 s on two shared cores, 40 s of it train
def test_the_pipeline_on_a_cluster_makes_the_parts_of_a_local_run(
    laptop: Laptop, bucket: Store, tmp_path: Path
) -> None:
    # another machine with the same code, without cluster and S3
    local = Laptop(
        shutil.copytree(laptop.root, tmp_path / "local"),
        {**plain_env(tmp_path), "PBE_STORAGE": str(tmp_path / "store")},
    )
    for stage in ("ingest", "filter", "materialize", "encode"):
        said = laptop.run(stage)
        assert ("submitted job" in said) == (stage != "filter")
    assert "submitted job" in laptop.run("train", "--variant", "full")
    laptop.run("bench")
    laptop.run("baseline", "--baseline", "copy_paste")
    assert "submitted job" in laptop.run("edit", "--variant", "full")
    assert "submitted job" in laptop.run("evaluate")
    assert list((laptop.root / "models" / "full").rglob("*.safetensors"))
    assert laptop.manifest("train/full")["steps"] == 4
    metrics = json.loads((laptop.root / "data" / "evaluate" / "metrics.json").read_text())
    assert any("frechet" in name for name in metrics["full"]["box"]["exemplar"])

    in_one_process = "import sys; from pipelines.__main__ import main; sys.exit(max(map(main, zip(sys.argv[1:]))))"
    subprocess.run(
        [sys.executable, "-c", in_one_process, "ingest", "filter", "materialize", "encode"],
        cwd=local.root,
        env=local.env,
        check=True,
        timeout=STEP_S,
    )
    for stage in ("materialize", "encode"):
        assert laptop.manifest(stage) == local.manifest(stage)
        for unit in load_manifest(laptop.root / "data" / stage / "manifest.json").units:
            for file in unit.files:
                assert sha256(bucket.read_bytes(file.path)).hexdigest() == file.sha256
