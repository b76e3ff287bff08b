"""A Ray cluster of several processes on this machine: a head that computes nothing, and nodes that come and go."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray.job_submission import JobDetails, JobSubmissionClient

UP_S = 150


@dataclass
class Nodes:
    """The running cluster. `env`: of its processes, so of what its jobs inherit."""

    folder: Path
    token: str
    dashboard_port: int
    gcs_port: int
    env: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    def jobs(self) -> list[JobDetails]:
        return [job for job in self.client().list_jobs() if job.submission_id]

    def add(self, *, cpus: int) -> subprocess.Popen[bytes]:
        """One more node, as `ray start --address` on another machine."""
        (agent,) = free_ports(1)
        own = self.folder / f"n{len(list(self.folder.glob('n*/')))}"
        own.mkdir()
        flags = {
            "address": f"127.0.0.1:{self.gcs_port}",
            # as on a machine of its own: in a shared one a node removes the package that another still runs from
            "temp-dir": own,
            "num-cpus": cpus,
            "dashboard-agent-listen-port": agent,
        }
        return self._start(flags)

    def wait_for(self, *, alive: int) -> None:
        """Until so many nodes are alive, the head among them."""
        deadline = time.monotonic() + UP_S
        while (found := self.alive()) != alive:
            if time.monotonic() > deadline:
                raise AssertionError(f"{found} nodes are alive, expected {alive}\n{self.log()}")
            time.sleep(0.2)

    def alive(self) -> int:
        request = self._request("/nodes?view=summary")
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            import json

            nodes = json.load(answer)["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        return 0

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As a machine that loses power: the raylet and all its workers at once."""
        for process in [*children(node), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(timeout=20)
        self.running.remove(node)

    def log(self) -> str:
        return (self.folder / "nodes.log").read_text()

    def _start(self, flags: dict[str, object]) -> subprocess.Popen[bytes]:
        # Ray's own head cannot start workers from an interpreter whose path has a space; ours may have one
        python = self.folder / "venv" / "bin" / Path(sys.executable).name
        every = {
            "node-ip-address": "127.0.0.1",
            "min-worker-port": 0,
            "max-worker-port": 0,
            "object-store-memory": 200_000_000,
        }
        command = [str(python), "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [
            f"--{name}={value}" if value is not None else f"--{name}" for name, value in (flags | every).items()
        ]
        with (self.folder / "nodes.log").open("a") as log:
            node = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.running.append(node)
        return node

    def _request(self, path: str) -> urllib.request.Request:
        return urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})

    def _wait_for_head(self, head: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + UP_S
        while True:
            try:
                urllib.request.urlopen(self._request("/api/version"), timeout=2).close()
                return
            except urllib.error.HTTPError as error:
                error.close()
                problem: Exception = error
            except OSError as error:
                problem = error
            if head.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"ray start --head did not come up: {problem}\n{self.log()}")
            time.sleep(0.2)


@contextmanager
def ray_nodes(env: dict[str, str], *, cpus: list[int], head_cpus: int = 0) -> Iterator[Nodes]:
    """A head and a node for each of `cpus`, as long as the block lasts. Ray asks for a token, which is made here."""
    folder = Path(tempfile.mkdtemp(prefix="pbe-ray-", dir="/tmp"))  # short: Ray's sockets are in there
    token = secrets.token_hex(16)
    dashboard, gcs, agent, client = free_ports(4)
    (folder / "venv").symlink_to(sys.prefix, target_is_directory=True)
    own = {
        **plain_env(folder, python=folder / "venv" / "bin" / Path(sys.executable).name),
        **token_env(token),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else it waits 30 s for Ray Data's detached actors
        "RAY_raylet_start_wait_time_s": str(UP_S),
        **env,
    }
    nodes = Nodes(folder, token, dashboard, gcs, own)
    flags: dict[str, object] = {
        "head": None,
        "num-cpus": head_cpus,
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "temp-dir": folder,
    }
    try:
        nodes._wait_for_head(nodes._start(flags))
        for number, each in enumerate(cpus):
            nodes.add(cpus=each)
            nodes.wait_for(alive=2 + number)  # one by one: of two that begin together on one machine, both may fail
        yield nodes
    finally:
        for node in reversed(nodes.running):
            stop(node)
        shutil.rmtree(folder, ignore_errors=True)


def stop(node: subprocess.Popen[bytes]) -> None:
    """By the ids of what was started here: `ray stop` would end everybody's Ray."""
    ours = children(node)
    node.terminate()
    try:
        node.wait(timeout=30)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def children(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []


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


def token_env(token: str) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
