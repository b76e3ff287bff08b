"""Ray on this machine alone, for one process or, with `shared`, for the stages of one command. No other user and no
other machine reaches it.

Ray makes its folders, with the sockets of its object store in them, writable by everyone. So they lie in a folder that
only this user can enter. Nothing here imports Ray before it is needed: light stages never need it.
"""

import fcntl
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.runtime.environment import LOCAL_RAY_ENV, WORKER_ENV, set_unset

PREFIX = "pbe-local-"  # of the folders; 8 more characters follow
KEPT = 5  # folders of runs that failed or were killed; older ones are removed
# Ray's longest socket: sockets/plasma_store in a session folder, which is named by the time in us and the process id
LONGEST_SOCKET = f"/{PREFIX}12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SHARED_RAY = "PBE_SHARED_RAY"  # set by `shared` for the processes it starts: 127.0.0.1:port
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107


def init_ray(*, prints_logs: bool = True) -> None:
    """Start Ray for this process, or connect to the one that it shares with others.

    prints_logs: whether a process that starts Ray prints what workers and Ray's own processes write. prepare_driver has
    set the environment, which limits Ray to loopback.
    """
    import ray

    set_unset(LOCAL_RAY_ENV)
    # Ray 2.60 puts the interpreter path into a shell command unquoted, so a space in it needs quotes
    runtime_env = {"env_vars": WORKER_ENV, "py_executable": shlex.quote(sys.executable)}
    if address := os.environ.get(SHARED_RAY):
        ray.init(address=address, logging_level="warning", log_to_driver=True, runtime_env=runtime_env)
        return
    _make_token_private()
    folder = _private_folder()
    ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        object_store_memory=1 << 30,
        include_dashboard=False,
        # prestarted workers lack our runtime_env and are never used; they cost 2 to 5 s on a small machine
        _system_config={"prestart_worker_first_driver": False},
        _temp_dir=str(folder / "r"),
        logging_level="warning",
        configure_logging=True,
        log_to_driver=prints_logs,
        runtime_env=runtime_env,
    )


@contextmanager
def shared() -> Iterator[None]:
    """Start a local Ray that the processes started in the block share; each would take 4 s to start and end its own."""
    with ended_with():
        init_ray(prints_logs=False)  # the stages print theirs, through their logs
        import ray

        os.environ[SHARED_RAY] = ray.get_runtime_context().gcs_address
        try:
            yield
        finally:
            del os.environ[SHARED_RAY]


@contextmanager
def ended_with() -> Iterator[None]:
    """End the Ray that the block starts, if any, and remove its folder; if the block fails, note where its logs are.

    From a shared Ray the block only disconnects.
    """
    try:
        yield
    except BaseException as error:
        if folder := _end():
            error.add_note(f"Ray's own logs of this run: {folder}/r/session_latest/logs")
        raise
    if (folder := _end()) and SHARED_RAY not in os.environ:
        shutil.rmtree(folder, ignore_errors=True)


def _end() -> Path | None:
    """End the Ray that this process has started or joined, if any, and return its folder."""
    if folder := _folder_in_use():
        import ray

        # as at the end of the process, where it would also wait for the last lines of the workers
        ray.shutdown(wait_for_processes=True, _exiting_interpreter=True)
    return folder


def _folder_in_use() -> Path | None:
    """Return the folder of the Ray that this process uses through `init_ray`, if any."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    folder = Path(ray.get_runtime_context().get_temp_dir()).parent
    return folder if folder.name.startswith(PREFIX) else None


def _private_folder() -> Path:
    """Make a folder that only this user can enter, in RAY_TMPDIR or TMPDIR unless its path is too long for sockets."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(base + LONGEST_SOCKET)) > SOCKET_PATH_BYTES:
        base = "/tmp"
    _remove_old(Path(base))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    _lock(folder)  # until this process ends, however it does
    return folder


def _remove_old(base: Path) -> None:
    """Remove the folders that earlier processes of this user have left, but not the newest ones."""
    found = []
    for path in base.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError):  # another process may have removed it
            status = path.lstat()
            found += [(status.st_mtime_ns, path)] if status.st_uid == os.getuid() else []
    for _, path in sorted(found)[:-KEPT]:
        if (handle := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder as long as the returned file is open; None if another process holds it, also in a container."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _make_token_private() -> None:
    """Write Ray's token if there is none, and let only this user read its file; Ray would let everyone."""
    path = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".auth_token-")  # mode 0600
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was first: both must use its token
            os.link(beside, path)
        Path(beside).unlink()
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
