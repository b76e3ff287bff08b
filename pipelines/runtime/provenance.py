"""Provenance of a result for MLflow tags and the report: git commit, dvc.lock, versions."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

COMMIT_VARIABLE = "PBE_GIT_COMMIT"
LOCK_VARIABLE = "PBE_DVC_LOCK"
EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # DVC sets it
PACKAGES = ("torch", "deepspeed", "diffusers", "ray", "pyarrow", "albumentations", "mlflow", "dvc")


def git_commit(root: Path) -> str:
    """Return HEAD, with -dirty when tracked files differ; in a Ray job, the submitter's; else "unknown".

    dvc.lock does not count: DVC rewrites it with every stage.
    """
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", ".", ":!dvc.lock"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def lock_digest(root: Path) -> str:
    """Return the hash of dvc.lock; in a Ray job, the submitter's; "none yet" before the first `dvc repro`."""
    if LOCK_VARIABLE in os.environ:
        return os.environ[LOCK_VARIABLE]
    lock = root / "dvc.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:16] if lock.is_file() else "none yet"


def provenance_tags(root: Path) -> dict[str, str]:
    experiment = os.environ.get(EXPERIMENT_VARIABLE)
    return {
        **({"dvc_experiment": experiment} if experiment else {}),
        "git_commit": git_commit(root),
        "dvc_lock_sha256": lock_digest(root),
        "versions": " ".join(f"{name}=={version(name)}" for name in PACKAGES),
        "python": platform.python_version(),
    }
