"""Packs what a job needs (code, settings, manifests of earlier stages) into one zip, and rejects what cannot be sent.

The package is a whitelist: data stays in PBE_STORAGE, credentials stay local. The job's name derives from the package,
so two people with the same request share one job.
"""

import hashlib
import io
import ipaddress
import json
import os
import platform
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from pbe.places import refuse_credentials, tracking_uri
from pbe.settings import paths_in
from pbe.store import digest
from pipelines.runtime.differences import DIFF_VARIABLE, differences
from pipelines.runtime.environment import WORKER_ENV
from pipelines.runtime.progress_records import JOB_VARIABLE
from pipelines.runtime.provenance import (
    COMMIT_VARIABLE,
    EXPERIMENT_VARIABLE,
    LOCK_VARIABLE,
    git_commit,
    lock_digest,
)
from pipelines.runtime.stage import STAGES, VARIANT_STAGES, Stage, StageError, output_folder, versions

CODE_FOLDERS = ("pbe", "pipelines")
CODE_SUFFIXES = (".py", ".csv", ".j2", ".yaml")
KEPT_MODELS = "models/pretrained/"  # in git, and small: a job gets the one that its settings name
KEPT_MODEL_MAX_BYTES = 30_000_000
KEPT_MODEL_SUFFIXES = (".json", ".safetensors")
SETTINGS = "params.yaml"
SUBMITTER_VARIABLE = "PBE_SUBMITTER"  # versions of the machine that sent the job
MARK_VARIABLE = "PBE_SUBMITTER_MARK"  # its empty file in NODES
NODES = "nodes"  # folder of the storage: an empty file for each machine that has written there
EQUAL_PACKAGES = ("ray",)  # must be the same on both sides
# a difference is only warned of: they affect the bytes of parts and the losses
BYTES_PACKAGES = (
    "albumentations",
    "deepspeed",
    "diffusers",
    "opencv-python-headless",
    "pyarrow",
    "simplejpeg",
    "torch",
)
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # equal content, equal bytes


@dataclass(frozen=True)
class Package:
    """Files by their path below the job's folder; and of those that are inputs, their SHA-256: manifests and counts of
    earlier stages, and a kept model that the settings name.
    """

    files: Mapping[str, bytes]
    inputs: Mapping[str, str]

    def zipped(self, job_id: str) -> bytes:
        """Return the zip for one job: Ray unpacks equal packages into one folder, where attempts would share files."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as package:
            for path, data in sorted({**self.files, "job-id": job_id.encode()}.items()):
                entry = zipfile.ZipInfo(path, ZIP_DATE)
                entry.external_attr = 0o644 << 16
                package.writestr(entry, data, zipfile.ZIP_DEFLATED)
        return out.getvalue()


def pack(stage: Stage) -> Package:
    """Collect the files that this stage's job needs. Raises StageError for code that is a link out of the project."""
    files = {}
    for name in CODE_FOLDERS:
        for file in sorted((stage.root / name).rglob("*")):
            inner = file.relative_to(stage.root)
            hidden = any(part.startswith(".") for part in inner.parts)
            if file.suffix in CODE_SUFFIXES and file.is_file() and not hidden:
                if not file.resolve().is_relative_to(stage.root.resolve()):
                    raise StageError(
                        f"{inner} is a link to a file outside the project, which would travel with the job"
                    )
                files[inner.as_posix()] = file.read_bytes()
    files[SETTINGS] = (stage.root / SETTINGS).read_bytes()
    inputs = {}
    for file in [*_manifests(stage), *_kept_model_files(stage)]:
        path = file.relative_to(stage.root).as_posix()
        files[path] = file.read_bytes()
        inputs[path] = hashlib.sha256(files[path]).hexdigest()
    return Package(files, inputs)


def _manifests(stage: Stage) -> list[Path]:
    return [file for folder in _input_folders(stage) for file in sorted(folder.glob("*.json"))]


def _kept_model_files(stage: Stage) -> list[Path]:
    named = {path for _, path in _paths_of(stage) if _is_kept_model(stage, path)}
    return [file for name in sorted(named) for file in _files_of_model(stage.root / name)]


def _files_of_model(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in KEPT_MODEL_SUFFIXES and file.is_file())


def _input_folders(stage: Stage) -> list[Path]:
    # earlier stages only: a stage's own outputs would change its identity once it has run
    folders = []
    for name in STAGES[: STAGES.index(stage.name)]:
        if name in VARIANT_STAGES:  # only its variant; a stage without variants reads all
            variants = [stage.variant] if stage.variant else [*stage.params.variants]
            folders += [output_folder(stage.root, name, variant) for variant in variants]
        elif name == "baseline":
            baselines = [] if stage.variant else [*stage.params.baselines]
            folders += [output_folder(stage.root, name, baseline) for baseline in baselines]
        else:
            folders.append(output_folder(stage.root, name))
    return folders


def job_name(stage: Stage, package: Package) -> str:
    """The job's id without its attempt: pbe-<stage>[-<variant>]-<digest of all the result depends on>.

    Of the code that is the VERSION: a colleague's checkout that differs in a comment asks for the same job.
    """
    params = yaml.safe_load(package.files[SETTINGS])  # not its text: a comment changes nothing
    identity = digest([stage.name, stage.variant, params, versions(stage.name), dict(package.inputs), stage.store.uri])
    return "-".join(["pbe", stage.name, *([stage.variant] if stage.variant else []), identity])


def entrypoint(stage: Stage, job_id: str) -> str:
    """The shell command of the job: this stage again, with the cluster's python."""
    variant = [f"--{'baseline' if stage.name == 'baseline' else 'variant'}", stage.variant] if stage.variant else []
    return shlex.join(["python", "-m", "pipelines", stage.name, *variant, "--as-job", job_id])


def job_env(stage: Stage, job_id: str) -> dict[str, str]:
    """The environment variables that travel: places and versions, never keys."""
    return {
        **places(stage),
        JOB_VARIABLE: job_id,
        COMMIT_VARIABLE: git_commit(stage.root),  # the package has no .git
        LOCK_VARIABLE: lock_digest(stage.root),  # and no dvc.lock
        **({DIFF_VARIABLE: json.dumps(differences(stage))} if stage.name == "train" else {}),
        **({EXPERIMENT_VARIABLE: os.environ[EXPERIMENT_VARIABLE]} if EXPERIMENT_VARIABLE in os.environ else {}),
        SUBMITTER_VARIABLE: json.dumps(versions_here()),
        MARK_VARIABLE: _mark_here(),
        # start_ray sets WORKER_ENV again for its workers; without this Ray calls equal values a conflict
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
        **WORKER_ENV,
    }


def leave_mark(stage: Stage) -> None:
    """Write the file by which a job checks that it reads the same storage. Raises StoreError."""
    path = f"{NODES}/{_mark_here()}"
    if not stage.store.exists(path):
        stage.store.write_bytes(path, b"")


def _mark_here() -> str:
    return f"from-{platform.node()}"


def versions_here() -> dict[str, str]:
    """Return the versions of Python (major.minor) and of the packages that must agree between machines."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{name: version(name) for name in (*EQUAL_PACKAGES, *BYTES_PACKAGES)}}


# -- what cannot travel --------------------------------------------------------------------------------------


def places(stage: Stage) -> dict[str, str]:
    """Return where the job reads and writes, by environment variable."""
    return {"PBE_STORAGE": stage.store.uri, "MLFLOW_TRACKING_URI": tracking_uri()}


def refuse_what_cannot_travel(stage: Stage, to: str) -> None:
    """Before anything is sent to the cluster `to`: its dashboard's address, or a name.

    Raises StageError for an address that holds a password (without repeating it), a file of the project that the stage
    would look for there, and, unless the cluster is on this machine, storage or an MLflow that it cannot reach.
    """
    for name, uri in {"RAY_ADDRESS": to, **places(stage)}.items():
        refuse_credentials(name, uri)
    _refuse_what_stays_here(stage)
    if _is_loopback(urlsplit(to).hostname or ""):
        return
    if stage.store.is_local:
        raise StageError(
            f"PBE_STORAGE={stage.store.uri} is a folder of this machine, out of reach for {to}; "
            "set PBE_STORAGE=s3://bucket/prefix"
        )
    if urlsplit(tracking_uri()).scheme.split("+")[0] in ("sqlite", "file", ""):
        raise StageError(
            f"MLflow would write to {tracking_uri()}, a file of this machine, out of reach for {to}; "
            "set MLFLOW_TRACKING_URI=http://your-server:5000"
        )


def reads_outside(stage: Stage) -> bool:
    """Return whether a setting of the stage names files outside the package: they may change while it does not."""
    return any(path.startswith(("s3://", "/", "~")) for _, path in _paths_of(stage))


def _refuse_what_stays_here(stage: Stage) -> None:
    """Raises StageError for a file or folder inside the project that the stage would look for on the cluster."""
    for key, path in _paths_of(stage):
        if not _is_seen_there(path) and not _is_kept_model(stage, path):
            raise _does_not_travel(stage, key, path)


def _paths_of(stage: Stage) -> list[tuple[str, str]]:
    """Key and value of the stage's settings that name files."""
    section = "evaluate" if stage.name == "sweep" else stage.name
    settings = getattr(stage.params, section, None)
    if stage.name == "train" and stage.variant is not None:
        settings = stage.params.train_variant(stage.variant)
    if stage.name == "baseline" and stage.variant is not None:
        section, settings = f"baselines.{stage.variant}", stage.params.baselines[stage.variant]
    return list(paths_in(settings, f"{section}.")) if settings is not None else []


def _is_seen_there(path: str) -> bool:
    """Return whether the cluster finds what a setting names: by an absolute path, in S3, the package or the hub."""
    if path.startswith(("s3://", "/", "~")) or path in ("random", "sd"):
        return True
    if path.startswith("pbe/") and Path(path).suffix in CODE_SUFFIXES:
        return True
    from pbe.model.hub import is_on_hub  # needs torch, which most commands do not

    return is_on_hub(path)


def _is_kept_model(stage: Stage, path: str) -> bool:
    """Return whether a setting names a small model inside the project, without a link out of it."""
    if not path.startswith(KEPT_MODELS):
        return False
    files, root = _files_of_model(stage.root / path), stage.root.resolve()
    inside = all(file.resolve().is_relative_to(root / KEPT_MODELS) for file in files)
    return bool(files) and inside and sum(file.stat().st_size for file in files) <= KEPT_MODEL_MAX_BYTES


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
