"""Units on a real Ray of their own, in a process of their own."""

import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.runtime.parts import _interrupts_wait, _refuse_no_cluster
from pipelines.runtime.stage import StageError
from tests.pipelines.project import FOREIGN, ROOT

# Each unit ends only when the other has begun: one after the other they would wait for ever.
MEET = """
import sys, time
from functools import partial
from pathlib import Path
from pipelines.runtime.environment import prepare_driver
prepare_driver()
from pbe.config import load_params
from pbe.settings import TaskResources
from pbe.store import Store
from pipelines.runtime.stage import Stage
from pipelines.runtime.parts import Unit, run_units

def worker(store):
    def work(unit):
        Path(store.path(unit.label)).touch()
        deadline = time.monotonic() + 60
        while not all(Path(store.path(label)).exists() for label in ("a", "b")):
            assert time.monotonic() < deadline, f"{unit.label} ran alone"
            time.sleep(0.02)
        return store.write_unit("meet", unit.name, {}, counts={"met": 1})
    return work

store = Store(sys.argv[1])
stage = Stage("meet", None, load_params(), store, Path())
units = [Unit("a", "1", None), Unit("b", "1", None)]
each = TaskResources(cpus=2, memory_gib=0)
records = run_units(stage, "meet", units, worker=partial(worker, store), each=each, key="meet")
print([record.unit for record in records])
"""

# Two actors, three groups; one part, of two of them, is there.
GROUPS = """
import sys
from functools import partial
from pathlib import Path
from pipelines.runtime.environment import prepare_driver
prepare_driver()
from pbe.config import load_params
from pbe.settings import ActorResources
from pbe.store import Store
from pipelines.runtime.stage import Stage
from pipelines.runtime.parts import Unit, run_groups

def worker(store):
    def work(units):
        return [store.write_unit("made", unit.name, {}, counts={"of": len(units)}) for unit in units]
    return work

store = Store(sys.argv[1])
stage = Stage("made", None, load_params(), store, Path())
a, b, c, d, e, f = (Unit(label, "1", None) for label in "abcdef")
store.write_unit("made", b.name, {}, counts={"of": 0})
each = ActorResources(cpus=0.5, memory_gib=0, gpus=0)
groups = [[a, b, c], [b], [d, e, f]]
records = run_groups(stage, "made", groups, worker=partial(worker, store), each=each, key="evaluate", actors=2)
print([(record.unit, record.counts["of"]) for record in records])
"""

# Two actors, 40 parts of a quarter of a second; each says who made it. The first records are long: then Ray's ratio of
# what waits to what was read last is high.
SHARES = """
import os, sys, time
from collections import Counter
from functools import partial
from pathlib import Path
from pipelines.runtime.environment import prepare_driver
prepare_driver()
from pbe.config import load_params
from pbe.settings import ActorResources
from pbe.store import Store
from pipelines.runtime.stage import Stage
from pipelines.runtime.parts import Unit, run_units

def worker(store):
    def work(unit):
        time.sleep(0.25)
        counts = {f"count{index}": index for index in range(unit.payload)}
        return store.write_unit("made", unit.name, {}, counts={**counts, "by": os.getpid()})
    return work

store = Store(sys.argv[1])
stage = Stage("made", None, load_params(), store, Path())
units = [Unit(f"s{index:04}", "1", 20 * (index < 4)) for index in range(40)]
each = ActorResources(cpus=0.5, memory_gib=0, gpus=0)
records = run_units(stage, "made", units, worker=partial(worker, store), each=each, key="evaluate", actors=2)
print("shares", sorted(Counter(record.counts["by"] for record in records).values()))
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_actor_works_to_the_end(tmp_path: Path) -> None:
    """Ray Data gives all that is left to one actor while rows that have come back weigh more than what is asked for."""
    shares = _run(SHARES, tmp_path).rpartition("shares ")[2]
    least, most = sorted(map(int, shares.strip(" []\n").split(", ")))
    assert least + most == 40 and least >= 10, shares  # one may start seconds later


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_tasks_that_fit_run_side_by_side_from_the_start(tmp_path: Path) -> None:
    """Ray Data holds a task back until it knows what the first one's output weighs; ours weigh nothing."""
    assert "['a-1', 'b-1']" in _run(MEET, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_group_runs_what_is_missing_of_it_at_once_and_records_keep_their_order(tmp_path: Path) -> None:
    printed = _run(GROUPS, tmp_path)
    assert "[('a-1', 2), ('b-1', 0), ('c-1', 2), ('b-1', 0), ('d-1', 3), ('e-1', 3), ('f-1', 3)]" in printed
    assert "made: 2 of 7 parts are already there, 5 to do" in printed


def _run(program: str, folder: Path) -> str:
    (folder / "store").mkdir()
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(folder / "store")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ctrl_c_while_ray_starts_counts_when_it_has_started() -> None:
    seen = []

    def start() -> None:
        with _interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("started")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert seen == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_address_that_is_no_ray_head_is_refused_before_ray_tries_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not asked: Ray itself asks none
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "localhost", "127.0.0.1:port", "HTTP://127.0.0.1:9"):
            with pytest.raises(StageError, match=rf"RAY_ADDRESS={address} is not a Ray head .*http://host:8265"):
                _refuse_no_cluster(address)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{dashboard.server_port}"
        with pytest.raises(StageError, match=rf"is a web server, perhaps the dashboard: use http://{address};"):
            _refuse_no_cluster(address)
        dashboard.shutdown()


def test_ray_client_is_refused_by_every_stage(tmp_path: Path) -> None:
    env = {**os.environ, "RAY_ADDRESS": "ray://head:10001", "DVC_ROOT": str(tmp_path), "PBE_STORAGE": str(tmp_path)}
    command = [sys.executable, "-m", "pipelines", "filter"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pbe: error: RAY_ADDRESS=ray://head:10001 is for Ray Client; name the cluster's dashboard" in done.stderr
