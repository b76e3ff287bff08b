"""The bridge without a cluster: what a job is called, what travels, what is refused, what comes back.

Jobs on a real cluster are in test_cluster.py.
"""

import asyncio
import hashlib
import io
import json
import os
import re
import shlex
import signal
import socket
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import requests
from ray._private.runtime_env.packaging import get_uri_for_package
from ray.job_submission import JobDetails, JobStatus

from pbe.config import Params, VariantConfig
from pbe.data.settings import IngestConfig
from pbe.errors import UserError
from pbe.evaluate.settings import EvaluateConfig
from pbe.model.settings import EncodeConfig
from pbe.store import Store, StoreError
from pipelines import edit, features, materialize
from pipelines.cluster import submit, working_dir
from pipelines.cluster.job_entry import files_below, send_outputs
from pipelines.cluster.job_results import fetch, take_over_finished
from pipelines.runtime.stage import Stage, StageError
from tests.profiles import profile

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPBACK = "http://127.0.0.1:8265"
CLUSTER = "http://ray-head.example:8265"

PLANTED = {
    "pbe/model.py": "x = 1",
    "pbe/data/sample/boxes.csv": "ImageID",
    "pipelines/ingest.py": "def main(stage): ...",
    "pipelines/reporting/page.html.j2": "<html>",
    "params.yaml": "seed: 1",
    "data/ingest/manifest.json": '{"stage": "ingest"}',
    "data/filter/counts.json": "{}",
    "data/train/base/manifest.json": '{"variant": "base"}',
    # none of these may travel with materialize
    "dvc.yaml": "stages: {}",
    ".env": "TOKEN=secret",
    ".git/config": "[remote]",
    ".dvc/config.local": "secret",
    "pbe/.env": "TOKEN=secret",
    "pbe/.hidden/key.py": "secret",
    "pbe/weights.pth": "weights",
    "pbe/__pycache__/model.cpython-311.pyc": "cache",
    "models/base/unet/model.safetensors": "weights",
    "data/ingest/photos.parquet": "rows",
    "data/materialize/manifest.json": "{}",
    "data/train/other/manifest.json": "{}",
    "tests/test_model.py": "secret",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "a project"
    for name, text in PLANTED.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    for name in ("MLFLOW_TRACKING_URI", "RAY_API_SERVER_ADDRESS", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return open_fake(project, "materialize")


def ingest_params(**changes: Any) -> Params:
    """Only ingest's, of the tiny profile, with changes."""
    tiny = profile("tiny")
    ingest = IngestConfig.model_validate(tiny.ingest.model_dump() | changes)
    return tiny.model_copy(update={"ingest": ingest})


def open_fake(root: Path, name: str, variant: str | None = None, **changes: Any) -> Stage:
    values = {"store": Store(str(root.parent / "store")), "params": profile("tiny")}
    return Stage(name=name, variant=variant, root=root, **{**values, **changes})


# -- what is sent --------------------------------------------------------------------------------------------


def test_only_the_whitelist_travels(stage: Stage, tmp_path: Path) -> None:
    packed = working_dir.pack(stage)
    assert unzipped(packed.zipped("job-1"), tmp_path / "package") == {
        "job-id",
        "pbe/model.py",
        "pbe/data/sample/boxes.csv",
        "pipelines/ingest.py",
        "pipelines/reporting/page.html.j2",
        "params.yaml",
        "data/ingest/manifest.json",
        "data/filter/counts.json",
    }
    assert set(packed.inputs) == {"data/ingest/manifest.json", "data/filter/counts.json"}
    assert (tmp_path / "package" / "pbe" / "model.py").read_text() == "x = 1"


def test_a_kept_model_travels_to_the_stages_that_name_it_and_counts_for_their_names(project: Path) -> None:
    weights = project / "models" / "pretrained" / "small" / "codec" / "codec.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    tiny = profile("tiny")
    codec = {"codec": {"kind": "pretrained", "weights": "models/pretrained/small"}}
    named = tiny.model_copy(update={"encode": EncodeConfig.model_validate(tiny.encode.model_dump() | codec)})
    path, encode = weights.relative_to(project).as_posix(), open_fake(project, "encode", params=named)
    working_dir.refuse_what_cannot_travel(encode, LOOPBACK)
    assert working_dir.pack(encode).files[path] == b"weights"
    assert path not in working_dir.pack(open_fake(project, "materialize", params=named)).files
    before = job_name(encode)
    weights.write_bytes(b"others")
    assert job_name(encode) != before
    for train in (open_fake(project, "train", "full", params=trained_from(name)) for name in ("small", "typo")):
        init = train.params.train.init
        if init.endswith("small"):
            working_dir.refuse_what_cannot_travel(train, LOOPBACK)
            assert path in working_dir.pack(train).files
        else:
            with pytest.raises(StageError, match=f"train.init = {init} does not travel"):
                working_dir.refuse_what_cannot_travel(train, LOOPBACK)


def trained_from(name: str) -> Params:
    tiny = profile("tiny")
    return tiny.model_copy(update={"train": tiny.train.model_copy(update={"init": f"models/pretrained/{name}"})})


@pytest.mark.parametrize("kind", ["large", "link"])
def test_a_large_model_and_a_link_do_not_travel(project: Path, tmp_path: Path, kind: str) -> None:
    weights = project / "models" / "pretrained" / "mine" / "unet.safetensors"
    weights.parent.mkdir(parents=True)
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"secret")
        weights.symlink_to(tmp_path / "elsewhere")
    else:
        with weights.open("wb") as stream:
            stream.truncate(working_dir.KEPT_MODEL_MAX_BYTES + 1)
    train = open_fake(project, "train", "full", params=trained_from("mine"))
    with pytest.raises(StageError, match=r"train\.init = models/pretrained/mine does not travel"):
        working_dir.refuse_what_cannot_travel(train, LOOPBACK)
    assert not any(path.startswith("models/") for path in working_dir.pack(train).files)


def test_equal_files_make_equal_packages(stage: Stage) -> None:
    assert working_dir.pack(stage).zipped("job-1") == working_dir.pack(stage).zipped("job-1")
    assert working_dir.pack(stage).zipped("job-1") != working_dir.pack(stage).zipped("job-2")


def unzipped(data: bytes, folder: Path) -> set[str]:
    """Unpacks as Ray does; returns the paths."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    return set(files_below(folder))


def test_a_variant_gets_the_manifests_of_its_own_training(project: Path) -> None:
    inputs = working_dir.pack(open_fake(project, "edit", "base")).inputs
    assert "data/train/base/manifest.json" in inputs
    assert "data/train/other/manifest.json" not in inputs


def test_a_stage_of_all_methods_gets_the_manifests_of_all(project: Path) -> None:
    for name in ("base", "other", "pasted", "left over"):
        folder = project / "data" / "edit" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    params = profile("tiny").model_copy(
        update={"variants": {"base": VariantConfig(), "other": VariantConfig()}, "baselines": {"pasted": None}}
    )
    inputs = working_dir.pack(open_fake(project, "evaluate", params=params)).inputs
    edits = {name for name in inputs if name.startswith("data/edit/")}
    assert edits == {f"data/edit/{name}/manifest.json" for name in ("base", "other", "pasted")}
    assert {"data/train/base/manifest.json", "data/train/other/manifest.json"} <= set(inputs)


def test_the_package_holds_all_code_and_its_templates(tmp_path: Path) -> None:
    there = unzipped(working_dir.pack(open_fake(REPOSITORY, "edit", "base")).zipped("job-1"), tmp_path)
    code = {path for folder in ("pbe", "pipelines") for path in (REPOSITORY / folder).rglob("*") if path.is_file()}
    code = {path for path in code if path.suffix in (".py", ".j2", ".csv", ".yaml")}
    assert {path.relative_to(REPOSITORY).as_posix() for path in code} <= there


def test_places_travel_and_credentials_do_not(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    env = working_dir.job_env(stage, "job-1")
    assert env["PBE_STORAGE"] == stage.store.uri
    assert env["MLFLOW_TRACKING_URI"] == "http://mlflow.example:5000"
    assert "secret" not in env.values()


@pytest.mark.parametrize("variant", [None, "base", "it's; rm -rf $HOME"])
def test_the_shell_reads_the_entrypoint_as_it_was_meant(project: Path, variant: str | None) -> None:
    stage = open_fake(project, "train", variant)
    given = ["--variant", variant] if variant else []
    command = working_dir.entrypoint(stage, "pbe-train-1")
    assert shlex.split(command) == ["python", "-m", "pipelines", "train", *given, "--as-job", "pbe-train-1"]


# -- what a job is called ------------------------------------------------------------------------------------


def test_the_name_says_stage_and_variant(project: Path) -> None:
    assert job_name(open_fake(project, "ingest")).startswith("pbe-ingest-")
    assert job_name(open_fake(project, "train", "full")).startswith("pbe-train-full-")


def job_name(stage: Stage) -> str:
    return working_dir.job_name(stage, working_dir.pack(stage))


def test_the_name_follows_what_the_result_depends_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = job_name(stage)
    assert name == job_name(stage)
    others = [job_name(open_fake(stage.root, "materialize", store=Store("/other")))]
    with monkeypatch.context() as changed:
        changed.setattr(materialize, "VERSION", materialize.VERSION + 1)
        others.append(job_name(stage))
    (stage.root / "data" / "ingest" / "manifest.json").write_text('{"stage": "ingest", "other": 1}')
    others.append(job_name(stage))
    (stage.root / "params.yaml").write_text("seed: 2")
    others.append(job_name(stage))
    assert len({name, *others}) == 5
    (stage.root / "params.yaml").write_text("seed:   2  # a comment")
    assert job_name(stage) == others[-1]


def test_two_checkouts_that_differ_in_a_comment_ask_for_the_same_job(stage: Stage) -> None:
    """The code travels, and is no part of the name: its VERSION is."""
    name, sent = job_name(stage), working_dir.pack(stage).files
    (stage.root / "pbe" / "model.py").write_text("x = 1  # one")
    assert job_name(stage) == name and working_dir.pack(stage).files != sent


@pytest.mark.parametrize(("name", "module"), [("sweep", edit), ("sweep", features), ("evaluate", features)])
def test_the_name_follows_the_versions_of_all_parts_that_a_stage_makes(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType
) -> None:
    stage = open_fake(project, name, params=profile("tiny").model_copy(update={"variants": {}, "baselines": {}}))
    before = job_name(stage)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert job_name(stage) != before


def test_a_link_out_of_the_project_does_not_travel(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "key.py").write_text("secret")
    (stage.root / "pbe" / "key.py").symlink_to(tmp_path / "key.py")
    with pytest.raises(StageError, match=r"pbe/key\.py is a link"):
        working_dir.pack(stage)


def test_a_stage_that_has_run_keeps_its_name(stage: Stage) -> None:
    before = job_name(stage)
    (stage.outputs / "manifest.json").write_text('{"new": 1}')
    (stage.outputs / "counts.json").write_text("{}")
    assert job_name(stage) == before


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "storage", "mlflow", "told"),
    [
        (CLUSTER, "/data/store", "http://mlflow.example", "PBE_STORAGE=s3://bucket/prefix"),
        (CLUSTER, "s3://b/p", None, "set MLFLOW_TRACKING_URI=http"),
        (CLUSTER, "s3://b/p", "/home/me/mlruns", "set MLFLOW_TRACKING_URI=http"),
        (CLUSTER, "s3://b/p", "http://me:secret@mlflow.example", "MLFLOW_TRACKING_URI holds a password"),
        (LOOPBACK, "s3://KEY:secret@b/p", "http://mlflow.example", "PBE_STORAGE holds a password"),
        (LOOPBACK, "s3://KEY:sec/ret@b/p", "http://mlflow.example", "PBE_STORAGE holds a password"),
        ("http://me:secret@10.0.0.1:8265", "s3://b/p", "http://mlflow.example", "RAY_ADDRESS holds a password"),
        ("http://10.0.0.1:8265?token=secret", "s3://b/p", "http://mlflow.example", "RAY_ADDRESS holds a password"),
        ("http://[::1:8265", "s3://b/p", "http://mlflow.example", "RAY_ADDRESS is not a valid URL"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, address: str, storage: str, mlflow: str | None, told: str
) -> None:
    monkeypatch.setattr(submit, "_connect", lambda _: pytest.fail("connected"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow or "")
    store = Store("/anywhere")
    store.uri = storage  # a Store of a wrong address is refused by pyarrow before
    if storage.startswith("s3://"):
        monkeypatch.setattr(Store, "is_local", False)
    with pytest.raises(UserError) as caught:
        submit.run_remotely(open_fake(stage.root, "materialize", store=store), address)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_clusters_at_once_are_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(StageError, match="name two clusters"):
        submit.run_remotely(stage, LOOPBACK)


def test_storage_that_this_machine_cannot_read_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(store: Store, path: str) -> list[str]:
        raise OSError(f"AWS Error ACCESS_DENIED for {path}")

    monkeypatch.setattr(Store, "list_names", denied)
    with pytest.raises(StageError, match=r"PBE_STORAGE=.* cannot be read from here.*ACCESS_DENIED"):
        submit.run_remotely(stage, LOOPBACK)


def test_expired_credentials_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    with serving(answer, status=400) as address:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_SESSION_TOKEN": "old",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StageError) as error:
            submit.run_remotely(open_fake(project, "materialize", store=Store("s3://bucket/prefix")), LOOPBACK)
    assert "PBE_STORAGE=s3://bucket/prefix cannot be read from here" in str(error.value)
    assert "expired" in str(error.value).split("?): ")[1].lower()
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_an_address_where_nobody_listens_is_one_clear_error(stage: Stage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StageError, match=rf"RAY_ADDRESS={address} does not answer .*without RAY_ADDRESS"):
            submit.run_remotely(stage, address)


def test_an_address_that_is_silent_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StageError, match="does not answer"):
        submit.run_remotely(stage, f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("key", ["images", "boxes", "image_ids"])
def test_photos_inside_the_project_are_refused(stage: Stage, key: str) -> None:
    for inside in ("my/folder", "pbe/photos"):  # of pbe/ itself, code and the sample's lists travel
        paths = {"source": "folder", "images": "s3://shared/photos", "boxes": "/shared/boxes.csv", key: inside}
        with pytest.raises(StageError, match=f"ingest.{key} = {inside} does not travel"):
            submit.run_remotely(open_fake(stage.root, "ingest", params=ingest_params(**paths)), LOOPBACK)


@pytest.mark.parametrize(
    ("name", "key", "changes"),
    [
        ("encode", "encode.codec.weights", {"codec": {"kind": "pretrained", "weights": "my/sd"}}),
        ("encode", "encode.backbone.weights", {"backbone": {"kind": "clip", "weights": "my/clip", "tokens": "class"}}),
        ("bench", "bench.matcher.weights", {"matcher": {"kind": "clip", "weights": "my/clip", "mixture": None}}),
        ("bench", "bench.cocoee", {"source": "cocoee", "cocoee": "my/bench"}),
        ("evaluate", "evaluate.real_images", {"real_images": "my/photos", "real_images_px": 64}),
        (
            "sweep",
            "evaluate.extractors.0.weights",
            {"extractors": [{"kind": "clip", "weights": "my/clip", "mixture": None}]},
        ),
        (
            "evaluate",
            "evaluate.extractors.0.mixture",
            {"extractors": [{"kind": "clip", "weights": "/shared/clip", "mixture": "my/mixture.npz"}]},
        ),
        (
            "evaluate",
            "evaluate.extractors.0.file",
            {"extractors": [{"kind": "inception", "file": "my/inception.pt", "sha256": "0" * 64}]},
        ),
    ],
)
def test_weights_and_photos_inside_the_project_are_refused(
    stage: Stage, name: str, key: str, changes: dict[str, Any]
) -> None:
    section = key.split(".")[0]
    tiny = profile("tiny")
    settings: EncodeConfig | EvaluateConfig = getattr(tiny, section)
    changed = type(settings).model_validate(settings.model_dump() | changes)
    params = tiny.model_copy(update={section: changed})
    with pytest.raises(StageError, match=rf"{re.escape(key)} = my/\S+ does not travel"):
        submit.run_remotely(open_fake(stage.root, name, params=params), LOOPBACK)


@pytest.mark.parametrize(("status", "told"), [(404, "not a Ray dashboard"), (401, "RAY_AUTH_MODE=token")])
def test_a_server_that_is_not_ours_is_one_clear_error(stage: Stage, status: int, told: str) -> None:
    with serving("", status=status) as address, pytest.raises(StageError, match=told):
        submit.run_remotely(stage, address)


@pytest.mark.parametrize("answer", ["[]", '[{"type": 7}]', "{"])
def test_a_server_that_answers_something_else_is_one_clear_error(stage: Stage, answer: str) -> None:
    with serving(answer) as address, pytest.raises(StageError, match=r"not a Ray dashboard|cannot list") as error:
        submit.run_remotely(stage, address)
    assert "\n" not in str(error.value)


def test_a_request_that_is_never_answered_ends(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a tunnel that died: the first request is answered, the next is taken and no more."""
    monkeypatch.setattr(submit, "REQUEST_S", 0.3)
    with (
        serving('{"ray_version": "2.60.0", "version": "4"}', hang_at="/api/jobs/") as address,
        pytest.raises(StageError, match=r"cannot list the cluster's jobs: .*timed out"),
    ):
        submit.run_remotely(stage, address)


@contextmanager
def serving(answer: str, *, status: int = 200, hang_at: str = "") -> Iterator[str]:
    """A web server's address. `hang_at`: the path that it takes no end to answer."""
    over = threading.Event()

    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if hang_at and self.path.startswith(hang_at):
                over.wait()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


# -- a cluster of one class ----------------------------------------------------------------------------------


class Cluster:
    """Answers like Ray's client. `work` is what a submitted job does: it returns the job's status and log."""

    def __init__(self, work: Callable[[str], tuple[JobStatus, list[str]]] | None = None) -> None:
        self.jobs: dict[str, JobStatus] = {}
        self.logs: dict[str, list[str]] = {}
        self.work = work
        self.entrypoint, self.commit = "", "0123abc"
        self.packages: list[str] = []  # Ray's names of them, which name the folders on the nodes

    def list_jobs(self) -> list[JobDetails]:
        return [details(job_id, status) for job_id, status in self.jobs.items()]

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.entrypoint = entrypoint
        self.packages.append(get_uri_for_package(Path(runtime_env["working_dir"])))
        assert self.work is not None
        self.jobs[submission_id], self.logs[submission_id] = self.work(submission_id)
        return submission_id

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for chunk in self.logs[job_id]:
            yield chunk

    def get_job_info(self, job_id: str) -> JobDetails:
        return details(job_id, self.jobs[job_id], runtime_env={"env_vars": {"PBE_GIT_COMMIT": self.commit}})

    def get_job_status(self, job_id: str) -> JobStatus:
        return self.jobs[job_id]

    def stop_job(self, job_id: str) -> bool:
        self.jobs[job_id] = JobStatus.STOPPED
        return True


def details(job_id: str, status: JobStatus, **more: Any) -> JobDetails:
    return JobDetails(type="SUBMISSION", submission_id=job_id, status=status, entrypoint="", **more)


@pytest.fixture
def cluster(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Its jobs succeed and write a manifest that says which attempt they are."""

    def work(job_id: str) -> tuple[JobStatus, list[str]]:
        far = open_fake(stage.root.parent / "far", stage.name, store=stage.store)
        far.outputs.mkdir(parents=True, exist_ok=True)
        (far.outputs / "manifest.json").write_text(json.dumps({"job": job_id, "units": []}))
        (far.outputs / "counts.json").write_text("{}")
        send_outputs(far, job_id)
        return JobStatus.SUCCEEDED, ["done\n"]

    fake = Cluster(work)
    monkeypatch.setattr(submit, "_connect", lambda _: fake)
    monkeypatch.setattr(submit, "POLL_S", 0)
    return fake


def manifest(stage: Stage) -> dict[str, Any]:
    return json.loads((stage.outputs / "manifest.json").read_text())


def test_a_job_is_submitted_followed_and_its_outputs_come_back(
    stage: Stage, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    assert job_id.endswith("-1")
    assert manifest(stage)["job"] == job_id
    assert (stage.outputs / "counts.json").exists()
    assert [line for line in capsys.readouterr().out.splitlines() if "done" in line] == ["done"]
    assert shlex.split(cluster.entrypoint)[-1] == job_id
    assert not list(stage.outputs.parent.glob(".job-*"))


@pytest.mark.parametrize(
    "names",
    [
        {"units": [{"unit": "b0000-gone"}]},
        {"config": {"codec": "parts/encode/codec-gone/codec.safetensors"}},
        {"run": "full-gone", "export": {"unet.safetensors": "0"}},
    ],
)
def test_a_finished_job_whose_results_are_gone_runs_again(
    stage: Stage, cluster: Cluster, names: dict[str, Any]
) -> None:
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    send_manifest(stage, job_id, names)
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"].endswith("-2")


def send_manifest(stage: Stage, job_id: str, content: dict[str, Any]) -> None:
    """As the job itself would have sent it."""
    data = json.dumps(content).encode()
    marker = {"files": {"manifest.json": hashlib.sha256(data).hexdigest()}}
    stage.store.write_bytes(f"jobs/{job_id}/outputs/manifest.json", data)
    stage.store.write_bytes(f"jobs/{job_id}/outputs.json", json.dumps(marker).encode())


@pytest.mark.parametrize(
    ("file", "damaged"),
    [("outputs/manifest.json", "{}"), ("outputs.json", "{"), ("outputs.json", "[]"), ("outputs.json", '{"files": []}')],
)
def test_what_a_finished_job_sent_and_something_damaged_is_made_again(
    stage: Stage, cluster: Cluster, file: str, damaged: str
) -> None:
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    stage.store.write_bytes(f"jobs/{job_id}/{file}", damaged.encode())
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"].endswith("-2")


def test_a_finished_job_is_taken_over_with_parts_of_other_stages(stage: Stage, cluster: Cluster) -> None:
    """As evaluate's manifest has them: its looks are parts of their own."""
    table = pa.table({"value": [1.0]})
    record = stage.store.write_unit("features", "clip-edits-0", {"features": table}, counts={})
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    send_manifest(stage, job_id, {"job": job_id, "units": [asdict(record)]})
    submit.run_remotely(stage, LOOPBACK)
    assert len(cluster.jobs) == 1 and manifest(stage)["job"].endswith("-1")


def test_a_finished_job_whose_outputs_are_gone_runs_again(stage: Stage, cluster: Cluster) -> None:
    submit.run_remotely(stage, LOOPBACK)
    stage.store.delete_tree("jobs")
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"].endswith("-2")


def test_ingest_is_never_taken_over(stage: Stage, cluster: Cluster) -> None:
    outside = open_fake(stage.root, "ingest", params=ingest_params())
    for _ in range(2):
        submit.run_remotely(outside, LOOPBACK)
    assert len(cluster.jobs) == 2


@pytest.mark.parametrize("over", [JobStatus.FAILED, JobStatus.STOPPED])
def test_after_a_failure_comes_the_next_attempt(stage: Stage, cluster: Cluster, over: JobStatus) -> None:
    name = job_name(stage)
    cluster.jobs = {f"{name}-9": over, f"{name}-10": over, f"{name}-x": over, "raysubmit_1": over}
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"] == f"{name}-11"


def test_attempts_do_not_share_a_folder(stage: Stage, cluster: Cluster) -> None:
    cluster.work = lambda _: (JobStatus.FAILED, [])
    for _ in range(2):
        with pytest.raises(StageError):
            submit.run_remotely(stage, LOOPBACK)
    assert len(set(cluster.packages)) == 2


@pytest.mark.parametrize("commit", ["0123abc", "4567def"])
def test_a_running_job_is_attached_to_and_code_of_another_commit_is_said(
    stage: Stage, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    monkeypatch.setenv("PBE_GIT_COMMIT", commit)
    job_id = f"{job_name(stage)}-3"
    cluster.jobs = {job_id: JobStatus.RUNNING}

    async def finish(job_id: str) -> AsyncIterator[str]:
        assert cluster.work is not None
        cluster.jobs[job_id], _ = cluster.work(job_id)
        yield "going on\n"

    cluster.tail_job_logs = finish  # type: ignore[method-assign]
    submit.run_remotely(stage, LOOPBACK)
    assert list(cluster.jobs) == [job_id]
    said = capsys.readouterr().out
    assert f"attached again to job {job_id}" in said
    assert ("runs the code of commit 0123abc, here is 4567def" in said) == (commit == "4567def")


def test_who_submits_the_same_a_moment_later_follows_the_first(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have asked for the list of jobs before either has submitted."""
    asked = []

    def list_jobs() -> list[JobDetails]:
        asked.append(1)
        if len(asked) == 1:
            submit.run_remotely(stage, LOOPBACK)  # the other one
            stage.store.delete_tree("jobs")  # it has submitted, its outputs are not there yet
            cluster.tail_job_logs = finish  # type: ignore[method-assign]
        return []

    async def finish(job_id: str) -> AsyncIterator[str]:
        assert cluster.work is not None
        cluster.work(job_id)
        yield "going on\n"

    monkeypatch.setattr(cluster, "list_jobs", list_jobs)
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    assert f"attached again to job {job_id}" in capsys.readouterr().out


def test_what_finished_is_taken_over_when_its_cluster_is_gone(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of KubeRay's RayJob ends with its job, an autoscaled one over night."""
    submit.run_remotely(stage, LOOPBACK)
    assert len(cluster.jobs) == 1
    (stage.outputs / "manifest.json").unlink()
    monkeypatch.setattr(submit, "_connect", lambda _: pytest.fail("connected"))
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"].endswith("-1")


def test_a_new_cluster_counts_on_from_what_the_storage_knows(stage: Stage, cluster: Cluster) -> None:
    submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    cluster.jobs = {}
    stage.store.write_bytes(f"jobs/{job_id}/outputs/manifest.json", b'{"units": [{"unit": "b0000-gone"}]}')
    submit.run_remotely(stage, LOOPBACK)
    assert manifest(stage)["job"].endswith("-2")


def test_a_failed_job_is_an_error_with_its_id_and_the_end_of_its_log(stage: Stage, cluster: Cluster) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    cluster.work = lambda _: (JobStatus.FAILED, [*lines, "pbe: error: boom\n"])
    with pytest.raises(StageError) as caught:
        submit.run_remotely(stage, LOOPBACK)
    text = str(caught.value)
    assert text.splitlines()[0].startswith(f"job {next(iter(cluster.jobs))} is FAILED at {LOOPBACK}")
    assert text.endswith("pbe: error: boom")
    assert len(text.splitlines()) == 1 + submit.LOG_LINES
    assert json.loads((stage.outputs / "manifest.json").read_text()) == {}  # what was there before


def test_success_without_outputs_names_the_storage(stage: Stage, cluster: Cluster) -> None:
    cluster.work = lambda _: (JobStatus.SUCCEEDED, [])
    with pytest.raises(StageError, match=r"not in .*store.* is PBE_STORAGE the same place"):
        submit.run_remotely(stage, LOOPBACK)


def interrupted(cluster: Cluster) -> None:
    async def interrupt(job_id: str) -> AsyncIterator[str]:
        cluster.jobs[job_id] = JobStatus.RUNNING
        yield "working\n"
        raise KeyboardInterrupt

    cluster.tail_job_logs = interrupt  # type: ignore[method-assign]


def test_ctrl_c_detaches_and_says_how_to_come_back(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "STOP_S", 0)
    interrupted(cluster)
    with pytest.raises(KeyboardInterrupt):
        submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    assert cluster.jobs[job_id] == JobStatus.RUNNING
    said = capsys.readouterr().out
    assert "the same command attaches to it again" in said
    assert f"ray job stop --address {LOOPBACK} {job_id}" in said


def test_a_submission_without_an_answer_names_the_job(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(**_: object) -> str:
        raise requests.exceptions.ReadTimeout("Read timed out. (read timeout=60)")

    monkeypatch.setattr(cluster, "submit_job", silent)
    with pytest.raises(StageError, match=r"did not answer for job \S+-1 .*it may run.*ray job stop --address"):
        submit.run_remotely(stage, LOOPBACK)


def test_ctrl_c_while_the_job_is_sent_names_it(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster has it, its answer is on a slow line."""

    def taken(*, submission_id: str, **_: object) -> str:
        cluster.jobs[submission_id] = JobStatus.RUNNING
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "submit_job", taken)
    with pytest.raises(KeyboardInterrupt):
        submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    said = capsys.readouterr().out
    assert f"interrupted while job {job_id} was sent: it may run" in said
    assert f"ray job stop --address {LOOPBACK} {job_id}" in said


@pytest.mark.timeout(60)
def test_a_second_ctrl_c_stops_the_job(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "STOP_S", 20)
    interrupted(cluster)
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    again.start()
    with pytest.raises(KeyboardInterrupt):
        submit.run_remotely(stage, LOOPBACK)
    (job_id,) = cluster.jobs
    assert cluster.jobs[job_id] == JobStatus.STOPPED
    assert f"job {job_id} is STOPPED" in capsys.readouterr().out


@pytest.mark.timeout(30)
def test_ctrl_c_counts_when_the_connection_breaks_while_it_is_closed(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of closing then stands where the cancellation stood, and broken connections are tried again."""

    async def break_at_the_end(job_id: str) -> AsyncIterator[str]:
        try:
            yield "working\n"
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(20)
        finally:
            raise ConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(submit, "STOP_S", 0)
    cluster.tail_job_logs = break_at_the_end  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        submit.run_remotely(stage, LOOPBACK)


def test_a_broken_connection_repeats_no_line_and_loses_none(
    stage: Stage, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    connections = iter([["one\n", "tw"], [], ["one\ntwo\n", "three\n"]])

    async def flaky(job_id: str) -> AsyncIterator[str]:
        cluster.jobs[job_id] = JobStatus.RUNNING
        for chunk in next(connections):
            yield chunk
            if chunk == "three\n":
                cluster.jobs[job_id] = JobStatus.SUCCEEDED
                return
        raise RuntimeError("WebSocket connection closed unexpectedly")

    cluster.tail_job_logs = flaky  # type: ignore[method-assign]
    submit.run_remotely(stage, LOOPBACK)
    assert "\none\ntwo\nthree\n" in capsys.readouterr().out


def test_a_cluster_that_went_away_is_given_up_in_the_end(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(job_id: str) -> JobDetails:
        raise ConnectionError(f"no route for {job_id}")

    monkeypatch.setattr(submit, "LOST_S", 0)
    monkeypatch.setattr(cluster, "get_job_info", gone)
    with pytest.raises(StageError, match=r"lost contact .*no route.* attaches to it again"):
        submit.run_remotely(stage, LOOPBACK)


def test_a_cluster_that_began_anew_knows_the_job_no_more(
    stage: Stage, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(job_id: str) -> JobDetails:
        raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist\n")

    monkeypatch.setattr(cluster, "get_job_info", forgotten)
    with pytest.raises(StageError, match=r"no longer knows job \S+-1"):
        submit.run_remotely(stage, LOOPBACK)


# -- what comes back -----------------------------------------------------------------------------------------


def test_outputs_that_differ_from_the_marker_are_refused_whole(stage: Stage, cluster: Cluster) -> None:
    before = manifest(stage)
    assert cluster.work is not None
    cluster.work("job-1")
    stage.store.write_bytes("jobs/job-1/outputs/counts.json", b"{ half")
    with pytest.raises(StoreError, match="missing or differ"):
        fetch(stage, "job-1")
    assert manifest(stage) == before
    assert files_below(stage.outputs) == ["manifest.json"]


def test_a_job_that_wrote_nothing_does_not_send_it(project: Path) -> None:
    with pytest.raises(StageError, match="wrote nothing"):
        send_outputs(open_fake(project, "encode"), "job-1")


@pytest.mark.parametrize("path", ["/shared/photos", "s3://bucket/photos"])
def test_what_reads_files_outside_the_package_is_not_taken_over(stage: Stage, path: str) -> None:
    """`dvc repro -f -s evaluate` after photos were added: the job's name is the same."""
    scores = replace(stage, name="evaluate", variant=None)
    scores.store.write_bytes("jobs/pbe-evaluate-0-1/outputs/manifest.json", b"{}")
    listed = {"files": {"manifest.json": hashlib.sha256(b"{}").hexdigest()}}
    scores.store.write_bytes("jobs/pbe-evaluate-0-1/outputs.json", json.dumps(listed).encode())
    assert take_over_finished(scores, "pbe-evaluate-0") == "pbe-evaluate-0-1"
    evaluate = scores.params.evaluate.model_copy(update={"real_images": path})
    outside = replace(scores, params=scores.params.model_copy(update={"evaluate": evaluate}))
    assert take_over_finished(outside, "pbe-evaluate-0") is None
