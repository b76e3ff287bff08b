"""`pbe doctor`: each possible problem, made for real, is a line that says what to do."""

import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest

from pbe.cli.__main__ import main
from pbe.config import Params, load_params
from pbe.doctor import (
    Finding,
    checkpoint_bytes,
    examine,
    gib_of_trainings,
    profiles_for,
    repository,
    tracking,
    wanted_cpus,
)
from pbe.places import repo_root
from pbe.store import make_manifest, save_manifest
from pipelines.commands.profile import full_text
from tests.profiles import FOLDER


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the tiny profile, its own storage and MLflow database."""
    for name in ("RAY_ADDRESS", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PBE_STORAGE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / "params.yaml").write_text(full_text(FOLDER, "tiny"))
    shutil.copy(repo_root() / "requirements.lock", tmp_path)
    (tmp_path / ".dvc").mkdir()
    _git(tmp_path, "init")
    return tmp_path


def _git(folder: Path, *command: str) -> None:
    subprocess.run(["git", "-C", str(folder), *command, "--quiet"], check=True, capture_output=True)


def _found(root: Path, check: str) -> Finding:
    findings = {finding.check: finding for finding in examine(root, gpu=False, ranks=None)}
    return findings[check]


def _edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def test_nothing_fails_where_all_is_well(root: Path) -> None:
    findings = list(examine(root, gpu=False, ranks=None))
    assert [str(finding) for finding in findings if finding.level == "fail"] == []
    assert {"torch", "deepspeed", "storage", "MLflow", "CPUs of train", "disk of the storage"} <= {
        finding.check for finding in findings
    }
    assert list((root / "store").rglob("*.*")) == []  # its test file is removed
    assert not (root / "mlflow.db").exists()


def test_a_package_of_another_version(root: Path) -> None:
    _edit(root, "requirements.lock", "\ntorch==", "\ntorch==9.")
    finding = _found(root, "torch")
    assert finding.level == "warn"
    assert "requirements.lock has 9." in finding.found
    assert "make env" in finding.advice


def _repository(root: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in repository(root)}


def test_a_folder_that_is_no_repository(root: Path) -> None:
    (root / ".dvc").rmdir()
    found = _repository(root)
    assert found["DVC"].level == "fail" and "dvc init" in found["DVC"].advice
    assert found["git"].level == "ok"


@pytest.mark.parametrize("where", ["a subfolder", "a worktree", "a separate git folder", "without git"])
def test_where_dvc_works_doctor_agrees(root: Path, tmp_path: Path, where: str) -> None:
    """None of these has a folder .git."""
    if where == "a subfolder":
        at = root / "projects" / "mine"
    elif where == "a worktree":
        at = tmp_path / "worktree"
        _git(root, "-c", "user.name=me", "-c", "user.email=me@example.com", "commit", "--allow-empty", "-m", "start")
        _git(root, "worktree", "add", str(at))
    elif where == "a separate git folder":  # as a submodule's
        at = tmp_path / "inner"
        _git(tmp_path, "init", "--separate-git-dir", str(tmp_path / "elsewhere"), str(at))
    else:
        at = tmp_path / "plain"
        shutil.rmtree(root / ".git")
    (at / ".dvc").mkdir(parents=True)
    if where == "without git":
        (at / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n['remote \"mine\"']\n    url = /x\n")
    assert {finding.level for finding in repository(at)} == {"ok"}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("a ZIP file's folder", r"not a git repository.* `git init`; `dvc repro` needs it$"),
        ("a bare repository", r"bare repository.* `git clone` it"),
        ("a lost worktree", r"not a git repository: .*worktrees.* Put that repository back, or remove \.git"),
        ("another user's folder", r"belongs to another user.* `git config --global --add safe\.directory .*`$"),
        ("an ignored folder", r"a repository around .* ignores it\. `git init`"),
        ("no git program", r"is not in a git repository\. Install git, then `git init`$"),
        ("a damaged config", r"DVC: .*no section headers.* Mend \.dvc/config$"),
    ],
)
def test_where_dvc_cannot_work_doctor_says_what_to_do(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    at = root
    if where == "a bare repository":
        at = tmp_path / "bare.git"
        _git(tmp_path, "init", "--bare", str(at))
    elif where == "a lost worktree":
        shutil.rmtree(root / ".git")
        (root / ".git").write_text(f"gitdir: {tmp_path}/gone/.git/worktrees/mine\n")
    elif where == "another user's folder":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own, for its tests
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "nothing"))
    elif where == "an ignored folder":
        at = root / "projects" / "mine"
        (root / ".gitignore").write_text("projects/\n")
    elif where == "a damaged config":
        (root / ".dvc" / "config").write_text("no_scm\n")
    else:
        shutil.rmtree(root / ".git")
        if where == "no git program":
            monkeypatch.setenv("PATH", str(tmp_path))
    (at / ".dvc").mkdir(parents=True, exist_ok=True)
    [failed] = [finding for finding in repository(at) if finding.level == "fail"]
    assert re.search(said, str(failed)), str(failed)


def test_without_a_git_program_a_repository_is_enough(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert _repository(root)["git"].level == "warn"


@pytest.mark.parametrize("slow", ["rev-parse", "check-ignore"])
def test_a_git_that_does_not_answer(root: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    program = root / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nif [ "$1" = {slow} ]; then exec sleep 60; fi\necho true\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("pbe.doctor.ANSWER_S", 0.5)
    finding = _repository(root)["git"]
    assert finding.level == "fail" and "does not answer within 0.5 s" in finding.found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("zero_stage: 2", "zero_stage: 4", "train.zero_stage"), ("full: {}", "full: {lr: fast}", "lr")],
)
def test_settings_that_are_refused_in_the_base_or_in_a_variant(root: Path, old: str, new: str, said: str) -> None:
    _edit(root, "params.yaml", old, new)
    finding = _found(root, "params.yaml")
    assert finding.level == "fail" and said in finding.found


def test_a_storage_that_cannot_be_written(root: Path) -> None:
    (root / "store").write_text("a file where the folder should be")
    finding = _found(root, "storage")
    assert finding.level == "fail"
    assert str(root / "store") in finding.found


def test_a_bucket_that_is_not_there(root: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBE_STORAGE", f"{s3}-of-nobody/prefix")
    finding = _found(root, "storage")
    assert finding.level == "fail"
    assert "bucket-of-nobody" in finding.found
    monkeypatch.setenv("PBE_STORAGE", f"{s3}/doctor")
    assert _found(root, "storage").level == "ok"


def test_an_mlflow_that_does_not_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    finding = _found(root, "MLflow")
    assert finding.level == "fail" and "127.0.0.1:9" in finding.found
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")  # whose network may be another
    [finding] = tracking()
    assert finding.level == "warn" and "the cluster in RAY_ADDRESS must reach it" in finding.advice


def test_an_mlflow_whose_experiment_is_deleted(root: Path, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    [finding] = tracking()
    assert finding.level == "ok" and "takes runs" in finding.found
    MlflowClient(mlflow_uri).delete_experiment("1")
    finding = _found(root, "MLflow")
    assert finding.level == "fail" and "mlflow experiments restore -x 1" in finding.found


@pytest.mark.parametrize(("token", "level"), [(None, "fail"), ("right", "ok")])
def test_a_cluster_that_wants_a_token(
    root: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, level: str
) -> None:
    with _head(version("ray"), token="right") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        if token:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        finding = _found(root, "RAY_ADDRESS")
    assert finding.level == level
    assert token or "RAY_AUTH_TOKEN" in finding.advice


def test_a_stage_that_would_wait_for_ever(root: Path) -> None:
    _edit(root, "params.yaml", "per_worker: {cpus: 1,", "per_worker: {cpus: 4000,")
    finding = _found(root, "CPUs of train")
    assert finding.level == "fail" and "asks for 8000" in finding.found
    assert _found(root, "CPUs of encode").level == "ok"


def test_too_few_open_files(root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        finding = _found(root, "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.level == "warn" and "ulimit -n" in finding.advice


def test_a_temporary_folder_whose_sockets_ray_could_not_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(root / ("long" * 20)))
    (root / ("long" * 20)).mkdir()
    assert _found(root, "temporary folder").level == "fail"


def test_weights_that_are_not_there(root: Path) -> None:
    _edit(root, "params.yaml", "init: random", f"init: {root}/none")
    finding = _found(root, "train.init")
    assert finding.level == "fail" and "no such file or folder" in finding.found
    assert "org/name@revision" in finding.advice
    (root / "none").mkdir()
    assert _found(root, "train.init").level == "ok"


@pytest.mark.parametrize(
    ("card_gib", "fit", "too_large"),
    [
        (7.8, "finetune-8gb of", "openimages-12gb, openimages-24gb"),  # as a card of 8 GB reports it
        (15.7, "finetune-8gb, openimages-12gb of", "openimages-24gb"),
        (4.0, "none of", "finetune-8gb, openimages-12gb, openimages-24gb"),
    ],
)
def test_a_card_is_told_the_profiles_that_fit_it(card_gib: float, fit: str, too_large: str) -> None:
    finding = profiles_for(repo_root(), card_gib)
    assert finding.found == f"{fit} those for one card; too large: {too_large}"
    assert (finding.level == "warn") is (fit == "none of")


@pytest.mark.parametrize(
    ("precision", "stage", "size"),
    [
        *(("fp32", 0, 12), ("fp32", 1, 16), ("bf16_autocast", 2, 16), ("fp32", 3, 12)),
        *(("bf16", 0, 14), ("bf16", 1, 14), ("bf16", 2, 14), ("bf16", 3, 12)),
    ],
)
def test_a_checkpoint_takes_what_deepspeed_writes(precision: str, stage: int, size: int) -> None:
    """Measured: one rank, 262,656 parameters, files of save_engine."""
    train = load_params().train.model_copy(update={"precision": precision, "zero_stage": stage, "ema_decay": None})
    assert checkpoint_bytes(train) == size
    assert checkpoint_bytes(train.model_copy(update={"ema_decay": 0.99})) == size + 4


def _gib(root: Path, variants: str) -> dict[str, float]:
    text = full_text(FOLDER, "tiny")
    (root / "params.yaml").write_text(text[: text.index("\nvariants:")] + f"\nvariants: {variants}\nbaselines: {{}}\n")
    config = {"codec": {"channels": 48, "patch_px": 8}, "backbone": {"width": 1280}}
    (root / "data" / "encode").mkdir(parents=True, exist_ok=True)
    save_manifest(root / "data/encode/manifest.json", make_manifest("encode", config=config, version=1, units=[]))
    found = gib_of_trainings(root, load_params(root / "params.yaml"))
    assert found is not None
    return found


def test_the_disk_holds_checkpoints_and_models_of_every_variant(root: Path) -> None:
    """A model has 4 bytes per parameter; a checkpoint of ZeRO 2 in float32 has 16, two are kept, a third is written."""
    one = _gib(root, "{full: {}}")
    parameters = one["temporary folder"] / 16
    assert one["storage"] == pytest.approx((3 * 16 + 4) * parameters)
    both = _gib(
        root, "{full: {}, untrained: {train: {steps: 0}}, averaged: {train: {ema_decay: 0.9, ema_keep_raw: true}}}"
    )
    assert both["temporary folder"] == pytest.approx(20 * parameters)
    assert both["storage"] == pytest.approx((2 * 16 + 4 + 4 + 2 * 20 + 8 + 20) * parameters)
    untrained = _gib(root, "{full: {train: {steps: 0}}}")
    assert untrained["temporary folder"] == pytest.approx(4 * parameters)
    assert wanted_cpus(load_params(root / "params.yaml"))["train"] == 0


@contextmanager
def _head(ray_version: str, token: str | None = None) -> Iterator[str]:
    """Address of a fake Ray dashboard with a version endpoint; with a token, it requires it."""

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": ray_version}).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:9", "no Ray head answers"),
        ("http://127.0.0.1:port", "no Ray head answers"),
        ("ray://x:1", "http://"),
    ],
)
def test_a_cluster_that_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    finding = _found(root, "RAY_ADDRESS")
    assert finding.level == "fail" and said in str(finding)


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.0 200 OK\r\n\r\n[]", b"HTTP/1.0 200 OK\r\n\r\n{}"]
)
def test_an_address_of_another_server(root: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    class Other(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with TCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
        finding = _found(root, "RAY_ADDRESS")
    assert finding.level == "fail" and "no Ray head answers" in finding.found


def test_a_cluster_of_another_ray_and_a_storage_it_cannot_see(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _head("1.0.0") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert "Ray 1.0.0, here 2." in _found(root, "RAY_ADDRESS").found
        assert _found(root, "RAY_ADDRESS").level == "fail"
        assert _found(root, "PBE_STORAGE").level == "warn"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_train_save_and_go_on_as_one(root: Path) -> None:
    finding = list(examine(root, gpu=False, ranks=2))[-1]
    assert finding.check == "training drill (gloo)"
    assert finding.level == "ok", str(finding)
    assert "ZeRO 2, fp32, 2 ranks, saved, resumed on 1" in finding.found


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_drill_whose_ranks_fail_says_why(root: Path) -> None:
    from pbe.drill import DrillError, run_drill

    cfg = load_params(root / "params.yaml").train
    with pytest.raises(DrillError, match="not all ranks responded within 0 s"):
        run_drill(cfg, world=2, on_gpu=False, timeout_s=0.1)
    with pytest.raises(DrillError, match=r"rank 0: .*(NVIDIA|CUDA|cuda)"):
        run_drill(cfg, world=1, on_gpu=True, timeout_s=100)


def test_the_exit_code_and_the_last_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing fails")
    assert main(["doctor", "--gpu"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fail GPU: ") for line in out)
    assert out[-1].endswith(" ok") and " fail, " in out[-1]


def test_the_cpus_of_every_stage_that_reserves_some_are_compared() -> None:
    params, keys = load_params(), ("per_shard", "per_actor", "per_worker")
    reserving = {name for name in Params.model_fields if any(hasattr(getattr(params, name), key) for key in keys)}
    assert {"ingest", "bench", "train"} <= reserving == wanted_cpus(params).keys()
