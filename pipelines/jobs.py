"""The bridge to a cluster: a stage submits itself as a Ray job, follows its log and fetches its small files.

With RAY_ADDRESS=http://host:port, `run_remotely` ships the code and the input manifests (a whitelist), and a
job runs the same command there. Data stays in PBE_STORAGE, which both sides reach; what dvc.lock names comes
back through <storage>/jobs/<job id>/. A job is known by what it is made from: the same command attaches to it
while it runs, takes its outputs over when it is done, and numbers a new attempt when it failed (Ray refuses a
used id). Credentials never travel: the cluster's nodes have their own.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pbe.config import tracking_uri
from pbe.store import StoreError, digest
from pipelines.environment import WORKER_ENV
from pipelines.provenance import COMMIT_VARIABLE, git_commit
from pipelines.stage import STAGES, VARIANT_STAGES, Stage, StageError, output_folder

CODE_FOLDERS = ("pbe", "pipelines")
CODE_SUFFIXES = (".py", ".csv", ".j2")  # the ones that pbe.store.code_digest reads
ROOT_FILES = ("params.yaml", "dvc.yaml")

ANSWER_S = 10  # an address that does not answer for so long is reported as unreachable
QUIET_S = 60  # after so long without a log line, the job's status is asked and the log opened again
POLL_S = 2  # between two tries to reach a cluster that went away
LOST_S = 300  # after so long without an answer the command gives up; the job does not
LOG_LINES = 20  # of a failed job's log, repeated in the error

# what requests, aiohttp and Ray's client raise for a broken connection or a refused request
CLIENT_ERRORS = (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError)


def run_remotely(stage: Stage, address: str) -> None:
    """Run the stage as a job of the cluster at `address` and bring the files of `stage.outputs` back.

    Raises StageError when the settings cannot work there, the address does not answer, or the job fails (with
    its id and the end of its log). Ctrl-C detaches and raises KeyboardInterrupt; the job goes on.
    """
    _refuse_what_cannot_work(stage, address)
    _reach_storage(stage)
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="pbe-job-") as folder:
        inputs = pack(stage, Path(folder))
        name = job_name(stage, inputs)
        attempt, status = _last_attempt(client, name)
        job_id = f"{name}-{attempt}"
        if status == JobStatus.SUCCEEDED and _take_over(stage, job_id):
            print(f"{stage.name}: job {job_id} had finished before; its outputs are taken over", flush=True)
            return
        if status is None or status.is_terminal():
            job_id = f"{name}-{attempt + 1}"
            _submit(client, stage, job_id, Path(folder))
            print(f"{stage.name}: submitted job {job_id} to {address}", flush=True)
        else:
            print(f"{stage.name}: attached again to job {job_id}, which is {status} at {address}", flush=True)
    try:
        job, log_end = _follow(client, job_id, address)
    except KeyboardInterrupt:
        print(
            f"\n{stage.name}: detached; job {job_id} goes on, and the same command attaches to it again.\n"
            f"To stop it: ray job stop --address {address} {job_id}",
            flush=True,
        )
        raise
    if job.status != JobStatus.SUCCEEDED:
        raise StageError(f"job {job_id} is {job.status} at {address}; the end of its log:\n{_indented(log_end)}")
    if not _fetch(stage, job_id):
        raise StageError(
            f"job {job_id} succeeded, but its outputs are not in {stage.store.uri}; "
            "is PBE_STORAGE the same place for the cluster and for this machine?"
        )


def send_outputs(stage: Stage, job_id: str) -> None:
    """Inside the job: put the files of `stage.outputs` in the storage, then the marker that lists them.

    Raises StageError when the stage wrote none.
    """
    files = {path: _sha256(stage.outputs / path) for path in _files_below(stage.outputs)}
    if not files:
        raise StageError(f"stage {stage.name} wrote nothing in {stage.outputs}")
    stage.store.copy_tree_in(stage.outputs, f"jobs/{job_id}/outputs")
    stage.store.write_bytes(f"jobs/{job_id}/outputs.json", json.dumps({"files": files}, indent=1).encode())


# -- what is sent --------------------------------------------------------------------------------------------


def pack(stage: Stage, folder: Path) -> dict[str, str]:
    """Copy what the job needs to `folder`; returns the SHA-256 of each input by its path.

    Inputs are the JSON files of earlier stages below data/.
    """
    for name in CODE_FOLDERS:
        for file in sorted((stage.root / name).rglob("*")):
            inner = file.relative_to(stage.root)
            hidden = any(part.startswith(".") for part in inner.parts)
            if file.suffix in CODE_SUFFIXES and file.is_file() and not hidden:
                _copy(file, folder / inner)
    for name in ROOT_FILES:
        _copy(stage.root / name, folder / name)
    inputs = {}
    for source in _input_folders(stage):
        for file in sorted(source.glob("*.json")):
            inner = file.relative_to(stage.root)
            _copy(file, folder / inner)
            inputs[inner.as_posix()] = _sha256(file)
    return inputs


def _input_folders(stage: Stage) -> list[Path]:
    # earlier stages only: a stage's own outputs would change its identity once it has run
    folders = []
    for name in STAGES[: STAGES.index(stage.name)]:
        if name in VARIANT_STAGES:  # of its own variant; a stage that has none reads all
            variants = [stage.variant] if stage.variant else [*stage.params.variants]
            folders += [output_folder(stage.root, name, variant) for variant in variants]
        elif name == "baseline":
            baselines = [] if stage.variant else [*stage.params.baselines]
            folders += [output_folder(stage.root, name, baseline) for baseline in baselines]
        else:
            folders.append(output_folder(stage.root, name))
    return folders


def job_name(stage: Stage, inputs: dict[str, str]) -> str:
    """The job's id without its attempt: pbe-<stage>[-<variant>]-<digest of all the result depends on>."""
    params = (stage.root / "params.yaml").read_text()
    identity = digest([stage.name, stage.variant, params, stage.code, inputs, stage.store.uri])
    return "-".join(["pbe", stage.name, *([stage.variant] if stage.variant else []), identity])


def entrypoint(stage: Stage, job_id: str) -> str:
    """The shell command of the job: this stage again, with the cluster's python."""
    variant = ["--variant", stage.variant] if stage.variant else []
    return shlex.join(["python", "-m", "pipelines", stage.name, *variant, "--as-job", job_id])


def job_env(stage: Stage) -> dict[str, str]:
    """The environment variables that travel: places, never keys."""
    return {
        "PBE_STORAGE": stage.store.uri,
        "MLFLOW_TRACKING_URI": tracking_uri(),
        COMMIT_VARIABLE: git_commit(stage.root),  # the package has no .git
        # start_ray sets WORKER_ENV again for its workers; without this Ray calls equal values a conflict
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
        **WORKER_ENV,
    }


# -- what is refused -----------------------------------------------------------------------------------------


def _refuse_what_cannot_work(stage: Stage, address: str) -> None:
    """Raises StageError before anything is sent."""
    uris = {"RAY_ADDRESS": address, "PBE_STORAGE": stage.store.uri, "MLFLOW_TRACKING_URI": tracking_uri()}
    for name, uri in uris.items():
        where = urlsplit(uri)
        if "@" in where.netloc or (where.scheme == "s3" and ":" in where.netloc):
            raise StageError(
                f"{name} holds a user or a password, which everybody on the cluster could read; leave it out "
                "and give the nodes their own credentials (AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD)"
            )
    other = os.environ.get("RAY_API_SERVER_ADDRESS", address)  # Ray's client prefers it to what it is given
    if other.rstrip("/") != address.rstrip("/"):
        raise StageError(
            f"RAY_API_SERVER_ADDRESS={other} and RAY_ADDRESS={address} name two clusters; unset the former"
        )
    if stage.name == "ingest":
        for key in ("images", "boxes", "image_ids"):
            path = getattr(stage.params.ingest, key)
            if path and not Path(path).is_absolute() and not path.startswith(("pbe/", "s3://")):
                raise _does_not_travel(stage, f"ingest.{key}", path)
    for key, path in _evaluation_files(stage):
        if not Path(path).expanduser().is_absolute():
            raise _does_not_travel(stage, key, path)
    for key, name in _weights(stage):
        from pbe.model.hub import is_on_hub  # needs torch, which most commands do not

        if not Path(name).is_absolute() and not is_on_hub(name):
            raise _does_not_travel(stage, key, name)
    if _is_loopback(urlsplit(address).hostname or ""):
        return
    if stage.store.is_local:
        raise StageError(
            f"PBE_STORAGE={stage.store.uri} is a folder of this machine, out of reach for {address}; "
            "set PBE_STORAGE=s3://bucket/prefix"
        )
    if urlsplit(tracking_uri()).scheme.split("+")[0] in ("sqlite", "file", ""):
        raise StageError(
            f"MLflow would write to {tracking_uri()}, a file of this machine, out of reach for {address}; "
            "set MLFLOW_TRACKING_URI=http://your-server:5000"
        )


def _reach_storage(stage: Stage) -> None:
    try:
        stage.store.exists("jobs")
    except OSError as error:
        raise StageError(
            f"PBE_STORAGE={stage.store.uri} cannot be read from here, and a job's manifest comes back through it: "
            f"{_one_line(error)}"
        ) from None


def _weights(stage: Stage) -> Iterator[tuple[str, str]]:
    """Keys of params.yaml that name weights which the stage reads, and the names."""
    if stage.name == "encode":
        codec, backbone = stage.params.encode.codec, stage.params.encode.backbone
        if codec.kind == "pretrained":
            yield "encode.codec.weights", codec.weights
        if backbone.kind == "clip":
            yield "encode.backbone.weights", backbone.weights
    if stage.name in ("evaluate", "sweep"):
        for number, judge in enumerate(stage.params.evaluate.judges):
            if judge.kind == "clip":
                yield f"evaluate.judges.{number}.weights", judge.weights
    if stage.name == "train" and stage.variant is not None:
        init = stage.params.train_variant(stage.variant).init
        if init not in ("random", "sd"):
            yield "train.init", init


def _evaluation_files(stage: Stage) -> Iterator[tuple[str, str]]:
    """Keys of params.yaml that name files or folders which the stage reads where it runs, and their paths."""
    if stage.name in ("evaluate", "sweep"):
        cfg = stage.params.evaluate
        if cfg.reals is not None:
            yield "evaluate.reals", cfg.reals
        for number, judge in enumerate(cfg.judges):
            if judge.kind == "clip" and judge.mixture is not None:
                yield f"evaluate.judges.{number}.mixture", judge.mixture
            if judge.kind == "inception":
                yield f"evaluate.judges.{number}.file", judge.file


def _does_not_travel(stage: Stage, key: str, path: str) -> StageError:
    return StageError(
        f"{key} = {path} does not travel with a job; name it by an absolute path that every node of the cluster sees, "
        f"or run `env -u RAY_ADDRESS dvc repro {stage.name}` here"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


# -- the cluster ---------------------------------------------------------------------------------------------


def _connect(address: str) -> JobSubmissionClient:
    try:
        # first by urllib, because Ray's client would wait for minutes for an address that swallows packets
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # somebody answers; what is wrong, the client below says better
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StageError(
            f"RAY_ADDRESS={address} does not answer ({reason}); it must be the cluster's dashboard, "
            "http://host:8265 as a rule; without RAY_ADDRESS the stage runs on this machine"
        ) from None
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # its client reports each upload and each closed log
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise StageError(
            f"RAY_ADDRESS={address} wants a token, or another one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    except (*CLIENT_ERRORS, ValueError, KeyError) as error:
        raise StageError(f"RAY_ADDRESS={address} is no Ray dashboard that takes jobs: {_one_line(error)}") from None


def _last_attempt(client: JobSubmissionClient, name: str) -> tuple[int, JobStatus | None]:
    """Number and status of the newest job of this name, of those not over if any; (0, None) if none."""
    attempts = {}
    with _as_stage_error("cannot list the cluster's jobs"):
        for job in client.list_jobs():
            head, _, number = (job.submission_id or "").rpartition("-")
            if head == name and number.isdigit():
                attempts[int(number)] = job.status
    active = [number for number, status in attempts.items() if not status.is_terminal()]
    newest = max(active or attempts, default=0)
    return newest, attempts.get(newest)


def _submit(client: JobSubmissionClient, stage: Stage, job_id: str, package: Path) -> None:
    # Ray unpacks equal packages into one folder, where an attempt would find what the one before it wrote
    (package / "job-id").write_text(job_id)
    with _as_stage_error(f"the cluster did not take job {job_id} (the same command may work now)"):
        client.submit_job(
            entrypoint=entrypoint(stage, job_id),
            submission_id=job_id,
            runtime_env={"working_dir": str(package), "env_vars": job_env(stage)},
        )


@contextlib.contextmanager
def _as_stage_error(what: str) -> Iterator[None]:
    try:
        yield
    except CLIENT_ERRORS as error:
        raise StageError(f"{what}: {_one_line(error)}") from None


@dataclass
class _Log:
    """What of a job's log has been printed. Every connection sends it from its beginning."""

    printed: int = 0  # characters
    end: str = ""
    interrupted: bool = False

    async def follow(self, client: JobSubmissionClient, job_id: str) -> None:
        """Print what is new until the job is over. Raises TimeoutError after QUIET_S without a line."""
        try:
            await self._print(client.tail_job_logs(job_id))
        finally:
            # Ctrl-C cancels this task; a connection that breaks while it is being closed for that hides it
            task = asyncio.current_task()
            self.interrupted = task is not None and task.cancelling() > 0

    async def _print(self, chunks: AsyncIterator[str]) -> None:
        position = 0
        while True:
            async with asyncio.timeout(QUIET_S):  # a connection that died in a sleeping laptop says nothing
                text = await anext(chunks, None)
            if text is None:
                return
            new = text[max(0, self.printed - position) :]
            position += len(text)
            self.printed = max(self.printed, position)
            self.end = (self.end + new)[-20_000:]
            print(new, end="", flush=True)


def _follow(client: JobSubmissionClient, job_id: str, address: str) -> tuple[JobDetails, str]:
    """The job when it is over, and the end of its log. Raises StageError after LOST_S without an answer."""
    log = _Log()
    last_answer = time.monotonic()
    while True:
        try:
            # a broken log connection matters only when the cluster does not answer either
            with contextlib.suppress(*CLIENT_ERRORS):
                asyncio.run(log.follow(client, job_id))
            if log.interrupted:
                raise KeyboardInterrupt
            job = client.get_job_info(job_id)
        except CLIENT_ERRORS as error:
            if time.monotonic() - last_answer > LOST_S:
                raise StageError(
                    f"lost contact with {address} ({_one_line(error)}); job {job_id} may go on there, and "
                    "the same command attaches to it again"
                ) from None
        else:
            last_answer = time.monotonic()
            if job.status.is_terminal():
                return job, log.end or job.message or "(no log)"
        time.sleep(POLL_S)


# -- what comes back -----------------------------------------------------------------------------------------


def _take_over(stage: Stage, job_id: str) -> bool:
    """Fetch the outputs of a job that finished before; False when they are gone, or may be out of date."""
    if stage.name == "ingest":
        return False  # its inputs are outside: photos that were added since do not change the job's name
    path = f"jobs/{job_id}/outputs/manifest.json"
    if not stage.store.exists(path) or not _has_results(stage, json.loads(stage.store.read_bytes(path))):
        return False
    return _fetch(stage, job_id)


def _has_results(stage: Stage, manifest: dict[str, Any]) -> bool:
    """Whether all that a manifest names is in the storage: units, single parts, a model's export."""
    parts = [*_part_paths(manifest.get("config")), *_export_paths(manifest)]
    return all(stage.store.exists(path) for path in parts) and all(
        stage.store.find_unit(_made_by(unit, stage.name), unit["unit"]) for unit in manifest.get("units", ())
    )


def _made_by(unit: dict[str, Any], stage: str) -> str:
    """Whose part a unit is: evaluate's manifest names looks too. By the path of its files, parts/<stage>/<unit>/..."""
    return next((file["path"].split("/")[1] for file in unit.get("files", ())), stage)


def _part_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _part_paths(inner)
    elif isinstance(value, str) and value.startswith("parts/"):
        yield value


def _export_paths(manifest: dict[str, Any]) -> list[str]:
    return [f"runs/{manifest['run']}/export/{name}" for name in manifest.get("export", ())]


def _fetch(stage: Stage, job_id: str) -> bool:
    """Bring a job's outputs to `stage.outputs`, all or nothing; False when they are not in the storage.

    Raises StoreError when the storage holds others than the job listed.
    """
    marker = f"jobs/{job_id}/outputs.json"
    if not stage.store.exists(marker):
        return False
    listed = json.loads(stage.store.read_bytes(marker))["files"]
    stage.outputs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".job-", dir=stage.outputs.parent) as folder:
        beside = Path(folder)
        stage.store.copy_tree_out(f"jobs/{job_id}/outputs", beside)
        found = {path: _sha256(beside / path) for path in _files_below(beside)}
        if any(found.get(path) != sha256 for path, sha256 in listed.items()):
            raise StoreError(
                f"{stage.store.full_uri(marker)}: lists files that are missing or differ; "
                f"delete jobs/{job_id} there and run again"
            )
        # the manifest last: a stage whose manifest is there is done
        for path in sorted(listed, key=lambda path: path == "manifest.json"):
            (stage.outputs / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).replace(stage.outputs / path)
    return True


# -- files ---------------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-LOG_LINES:])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
