"""Work that Ray or the kernel ends because a node is low on memory: what is said, and that it goes on."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import WorkerGroupError

from pipelines.runtime import memory
from pipelines.runtime.memory import Patience, shortage
from pipelines.runtime.stage import StageError
from tests.pipelines.project import FOREIGN, ROOT

# Ray's own words, of a run whose threshold was set below what other programs used
RAYS_WORDS = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: \
61cf81513fdd) was 22.62GB used / 23.54GB limit (0.960922)
OOM kill reason: Memory usage 24287208704B exceeded threshold of 24012676914B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 1
]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
16617\t10.88\tpython -m another program
22845\t0.30\tray::MapWorker(Map(UnitActor))
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/debug-memory.html."""
NODE = (
    "node 127.0.0.1 is low on memory (22.6 of 23.5 GB in use, 10.88 of them by process 16617, python), "
    "so Ray ended some of this work"
)

# Units that end as argv[1] says, the first time or every time, on a real Ray.
RUN = """
import os, signal, sys
from functools import partial
from pathlib import Path
from pipelines.runtime.environment import prepare_driver
prepare_driver()
from pbe.config import load_params
from pbe.settings import ActorResources
from pbe.store import Store
from pipelines.runtime import memory
from pipelines.runtime.local_ray import ended_with
from pipelines.runtime.stage import Stage, StageError
from pipelines.runtime.parts import Unit, run_units
memory.WAITS_S = (0.1, 0.2)

def worker(store, how):
    def work(unit):
        first = not Path(store.path("tried")).exists()
        Path(store.path("tried")).touch()
        if how == "killed once" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "short once" and first:
            from ray.exceptions import OutOfMemoryError
            raise OutOfMemoryError(os.environ["RAYS_WORDS"])
        return store.write_unit("met", unit.name, {}, counts={"met": 1})
    return work

how, actors = sys.argv[1], int(sys.argv[2]) or None
store = Store(str(Path("store").absolute()))
stage = Stage("ingest", None, load_params(), store, Path())
units = [Unit("a", "1", None), Unit("b", "1", None)]
each = ActorResources(cpus=1, memory_gib=0, gpus=0)
with ended_with():
    try:
        work = partial(worker, store, how)
        records = run_units(stage, "met", units, worker=work, each=each, key="ingest", actors=actors)
        print([record.unit for record in records])
    except StageError as error:
        print("StageError:", error)
"""


# A training that loses its only rank once, when Ray Train itself may not replace it.
TRAIN = """
from pathlib import Path
from pipelines.runtime.environment import prepare_driver
prepare_driver()
from pbe.config import load_params
from pbe.store import Store
from pbe.train.checkpoints import Run
from pipelines import train
from pipelines.runtime import memory
from pipelines.runtime.local_ray import ended_with
from pipelines.runtime.parts import start_ray
from pipelines.runtime.stage import Stage
from tests.train.ranks import KillOnceAt, loss_curve, tiny_config, tiny_encoded, tiny_spec
memory.WAITS_S = (0.1, 0.2)

store = Store(str(Path("store").absolute()))
cfg = tiny_config(steps=12, checkpoint_every=2, max_failures=0)
kill = KillOnceAt(5, Path("killed").absolute())
spec = tiny_spec(store, tiny_encoded(store), cfg, "full-1", on_progress=kill)
with ended_with():
    start_ray()
    run = Run(store, "full-1")
    run.write_json("mlflow.json", {"run_id": None, "attempt": 1})
    train._fit(Stage("train", "full", load_params(), store, Path()), spec, run)
print(len(loss_curve(store, "full-1")) - 1, "steps")
"""


def run(
    folder: Path, how: str = "", *, program: str = RUN, actors: int = 0, env: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The output of a program, which must end well."""
    (folder / "store").mkdir()
    own = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    own |= {"PYTHONPATH": str(ROOT), "RAYS_WORDS": RAYS_WORDS, **env}
    command = [sys.executable, "-c", program, how, str(actors)]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_ray_says_in_a_document_becomes_half_a_sentence() -> None:
    assert shortage(OutOfMemoryError(RAYS_WORDS)) == NODE
    assert shortage(WorkerGroupError("rank 0 failed", {0: OutOfMemoryError(RAYS_WORDS)})) == NODE
    killed = WorkerGroupError("The actor is dead. Worker exit type: SYSTEM_ERROR Worker exit detail: End of file", {})
    assert "was killed, by the kernel if memory was short" in str(shortage(killed))
    assert shortage(ValueError("no photo")) is None


def test_waits_grow_and_end_and_start_over_after_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "WAITS_S", (0.01, 0.02))
    patience = Patience("train@full", "lower train.micro_batch")
    for done in (0, 0, 5, 5):
        patience.wait(NODE, done=done)
    waits = [line.partition("retrying in ")[2].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert waits == ["0.01", "0.02", "0.01", "0.02"]
    with pytest.raises(StageError, match=r"train@full: node .* low on memory .*lower train.micro_batch; finished work"):
        patience.wait(NODE, done=5)


def test_a_node_that_stays_full_is_waited_for_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WAITS_S", (0.01, 0.02))
    monkeypatch.setenv("RAY_memory_usage_threshold", "1.1")
    memory.wait_for_memory(Patience("edit@full", "lower edit.actors"))
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0")
    with pytest.raises(StageError, match=r"edit@full: its node has .* of memory left, and again .*lower edit.actors"):
        memory.wait_for_memory(Patience("edit@full", "lower edit.actors"))


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_a_shortage_that_passes_is_told_and_the_parts_are_made(tmp_path: Path) -> None:
    printed = run(tmp_path, "short once")
    assert f"ingest: {NODE}; retrying in 0.1 s. If it repeats: raise ingest.per_shard.memory_gib" in printed
    assert "['a-1', 'b-1']" in printed


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_rays_own_monitor_ends_tasks_and_the_message_names_node_and_setting(tmp_path: Path) -> None:
    settings = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    printed = run(tmp_path, "well", env=settings)
    assert "StageError: ingest: node 127.0.0.1 is low on memory (" in printed
    assert "and again after waits of 0.3 s; close other programs, or raise ingest.per_shard.memory_gib" in printed


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_an_actor_that_is_killed_says_so_when_it_is_back(tmp_path: Path) -> None:
    printed = run(tmp_path, "killed once", actors=1)
    assert "ingest: an actor ended and was started again; its node has " in printed
    assert "If it repeats: lower ingest.actors" in printed
    assert "['a-1', 'b-1']" in printed


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_a_training_whose_only_rank_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    printed = run(tmp_path, program=TRAIN)
    assert "train@full: a process of this work was killed, by the kernel if memory was short" in printed
    assert "retrying in 0.1 s. If it repeats: lower train.micro_batch or train.workers" in printed
    assert "resuming from step" in printed
    assert "12 steps" in printed
