"""A local Ray: who can reach it, and what it leaves behind."""

import ipaddress
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime import local_ray
from tests.pipelines.project import FOREIGN, ROOT

# As `python -m pipelines` does it. Prints where every process of Ray listens: addresses, and paths of sockets.
RUN = """
import json, sys
from pipelines.runtime.environment import prepare_driver
from pipelines.runtime.local_ray import ended_with
from pipelines.runtime.stage import StageError
prepare_driver()
import psutil
with ended_with():
    from pipelines.runtime.parts import start_ray
    start_ray()
    import ray
    assert ray.data.range(2).map(lambda row: row).count() == 2
    if sys.argv[1:]:
        raise StageError(sys.argv[1])
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [(c.status, c.laddr) for process in family for c in process.net_connections("all")]
    paths = [address for _, address in found if isinstance(address, str)]
    print(json.dumps(paths + [address.ip for status, address in found if status == "LISTEN"]))
"""


def run(tmp: Path, *arguments: str, program: str = RUN) -> subprocess.CompletedProcess[str]:
    """The program with a home of its own, and with Ray's folders in tmp, unless its path is too long."""
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN and not key.startswith("RAY_")}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp), "RAY_TMPDIR": str(tmp)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=tmp, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="pbe-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_no_other_machine_and_no_other_user_reaches_it_and_nothing_stays(short: Path) -> None:
    done = run(short)
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])
    sockets = {place for place in places if place.startswith("/")}
    addresses = {ipaddress.ip_address(place) for place in places if place and not place.startswith(("/", "@"))}
    assert len(addresses) > 0 and all((getattr(a, "ipv4_mapped", None) or a).is_loopback for a in addresses), addresses
    assert any(path.endswith("/plasma_store") for path in sockets)
    assert {Path(path).relative_to(short).parts[0][: len(local_ray.PREFIX)] for path in sockets} == {local_ray.PREFIX}
    assert list(short.glob(f"{local_ray.PREFIX}*")) == []
    token = short / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) >= 32


# As `python -m pipelines repro` does it, with two stages; each prints its session.
SHARED = """
import subprocess, sys
from pipelines.runtime.environment import prepare_driver
from pipelines.runtime.local_ray import shared
prepare_driver()
with shared():
    for _ in range(2):
        subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
    import ray, time
    ray.get(ray.remote(lambda: print("from a worker")).remote())
    time.sleep(2)  # Ray prints such lines within half a second
"""
JOIN = """
from pipelines.runtime.environment import prepare_driver
from pipelines.runtime.local_ray import ended_with
prepare_driver()
with ended_with():
    from pipelines.runtime.parts import start_ray
    start_ray()
    import ray
    assert ray.data.range(2).map(lambda row: row).count() == 2
    print(ray.get_runtime_context().get_session_name())
"""


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_two_stages_share_one_and_nothing_stays(short: Path) -> None:
    done = run(short, JOIN, program=SHARED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from a worker" not in done.stdout + done.stderr  # nobody asked this process to print what Ray writes
    sessions = done.stdout.split()
    assert len(sessions) == 2 and len(set(sessions)) == 1
    assert list(short.glob(f"{local_ray.PREFIX}*")) == []


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_what_failed_leaves_its_logs_where_the_message_says(short: Path) -> None:
    done = run(short, "no photo")
    assert done.returncode != 0
    (folder,) = short.glob(f"{local_ray.PREFIX}*")
    assert f"Ray's own logs of this run: {folder}/r/session_latest/logs" in done.stderr
    assert list((folder / "r" / "session_latest" / "logs").glob("raylet*"))
    assert folder.stat().st_mode & 0o777 == 0o700  # Ray opens the folders inside to everyone


def test_of_what_was_killed_the_newest_folders_stay_and_those_in_use(tmp_path: Path) -> None:
    folders = []
    for age_s in range(8, 0, -1):
        folders.append(tmp_path / f"{local_ray.PREFIX}{age_s}")
        (folders[-1] / "r").mkdir(parents=True)
        os.utime(folders[-1], (1e9 - age_s, 1e9 - age_s))
    (tmp_path / "another").mkdir()
    held = local_ray._lock(folders[0])
    assert held is not None
    local_ray._remove_old(tmp_path)
    os.close(held)
    assert set(tmp_path.iterdir()) == {folders[0], *folders[-local_ray.KEPT :], tmp_path / "another"}


def test_a_folder_whose_path_leaves_no_room_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    folder = local_ray._private_folder()
    assert len(f"{folder.parent}{local_ray.LONGEST_SOCKET}") <= local_ray.SOCKET_PATH_BYTES
    folder.rmdir()


def test_a_token_that_others_can_read_is_closed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("theirs")  # as Ray writes it
    token.chmod(0o644)
    local_ray._make_token_private()
    assert token.read_text() == "theirs" and token.stat().st_mode & 0o777 == 0o600
