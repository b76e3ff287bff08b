"""Locations of the repository, the storage, the tracking server, and of the files that settings name. Per-user values
come from the environment (PBE_STORAGE, MLFLOW_TRACKING_URI)."""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from pbe.errors import ParamsError


def repo_root() -> Path:
    """The folder of params.yaml: the one above this package."""
    return Path(__file__).resolve().parent.parent


def home_root() -> Path:
    """Return the folder for relative defaults (.store, mlflow.db): the main repository, also in queued DVC experiments.

    DVC sets DVC_ROOT to it when it runs a stage in a temporary workspace.
    """
    return Path(os.environ.get("DVC_ROOT") or repo_root()).resolve()


def local_path(value: str) -> Path:
    """Return the absolute path of a file or folder that a setting names; the only reader of such settings.

    A relative one is below this workspace or, if it is not there, below the main repository: the workspace of a queued
    or temporary DVC experiment has only what git and DVC track, hence no weights and no photos. Raises ParamsError.
    """
    path = _expanded(value, value)
    here, home = repo_root() / path, home_root() / path
    return here if here == home or _is_there(here) else home


def _is_there(path: Path) -> bool:
    """False also for a folder of which git tracks only .gitignore or .gitkeep."""
    return any(not inner.name.startswith(".") for inner in path.iterdir()) if path.is_dir() else path.exists()


def _expanded(value: str, said: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise ParamsError(f"{said}: {error}") from None


# in the query of a URL; not sslkey and the like, which are paths
SECRET_KEYS = re.compile(r"(?i)passw|\bpwd\b|secret|token|\bsig\b|signature|access_?key|api_?key")


def refuse_credentials(name: str, uri: str) -> None:
    """Raises ParamsError if a URL contains a password or token, which would be printed, stored and sent.

    The message does not repeat it. name: the key or variable that holds the URL.
    """
    try:
        where = urlsplit(uri)
    except ValueError as error:
        raise ParamsError(f"{name} is not a valid URL: {error}") from None
    # a password may contain / and #, where urlsplit ends the host; Arrow reads KEY:secret@bucket
    after = uri.partition("://")[2]
    password = re.match(r"[^/:@]*:(?!\d{1,5}(/|$))[^@]*@", after) or (where.scheme == "s3" and ":" in where.netloc)
    token = "@" in where.netloc and where.scheme in ("http", "https")  # in the user's place
    asked = parse_qsl(where.query) if where.scheme else []
    if password or token or any(SECRET_KEYS.search(key) or SECRET_KEYS.search(value) for key, value in asked):
        raise ParamsError(
            f"{name} holds a password or a token, which logs, tags and the cluster would expose; remove it and set "
            "AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD, PGPASSWORD or RAY_AUTH_TOKEN, also on the nodes"
        )


def storage_uri() -> str:
    """PBE_STORAGE: an absolute local path or s3://bucket/prefix; default `.store` in the repository."""
    value = os.environ.get("PBE_STORAGE") or ".store"
    refuse_credentials("PBE_STORAGE", value)
    if value.startswith("s3://") and value.strip("/") != "s3:":
        return value.rstrip("/")
    if "://" in value:
        raise ParamsError(f"PBE_STORAGE={value}: use a local path or s3://bucket/prefix")
    return str((home_root() / _expanded(value, f"PBE_STORAGE={value}")).resolve())


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the repository.

    A path in it is made absolute: MLflow would take a relative one from wherever a worker or a temporary experiment
    runs, and lose the runs. Raises ParamsError.
    """
    value = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    refuse_credentials("MLFLOW_TRACKING_URI", value)
    said = f"MLFLOW_TRACKING_URI={value}"
    scheme, mark, path = value.rpartition("sqlite://")
    if mark and not scheme:
        if path in ("", "/", "/:memory:"):
            raise ParamsError(f"{said}: SQLite in memory forgets every run; name a file, sqlite:////folder/mlflow.db")
        # SQLite's own form, file:..., has an absolute path or means one
        return value if path.startswith("/file:") else f"{mark}/{home_root() / _expanded(path[1:], said)}"
    if ":" not in value and value != "databricks":  # a folder of MLflow's older file store
        return str(home_root() / _expanded(value, said))
    return value
