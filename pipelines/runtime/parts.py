"""Runs units of work through Ray Data, one row per unit; skips finished units and shows a progress bar."""

import json
import logging
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from pbe.errors import UserError
from pbe.settings import ActorResources, TaskResources
from pbe.store import Record, record_from
from pipelines.runtime import local_ray
from pipelines.runtime.capacity import Demand, ray_resources, refuse_unmet
from pipelines.runtime.cures import with_cure
from pipelines.runtime.environment import DRIVER_ENV, WORKER_ENV, is_local, set_unset
from pipelines.runtime.memory import Patience, shortage, wait_if_restarted
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.progress_records import write_plan
from pipelines.runtime.stage import Stage, StageError

ANSWER_S = 10  # a Ray head must accept a connection within this time


@dataclass(frozen=True)
class Unit:
    """One unit of work. `label` names the part (s0003), `digest` identifies its inputs, `payload` goes to the task."""

    label: str
    digest: str
    payload: Any

    @property
    def name(self) -> str:
        return f"{self.label}-{self.digest}"


Work = Callable[[Sequence[Unit]], list[Record]]  # runs units; their records in the same order


def start_ray() -> None:
    """Start a local Ray, or connect to the cluster that a job runs on. Does nothing if this process has started Ray.

    A local Ray gets at least four logical CPUs, so that two cores can rehearse more workers than they are.
    """
    if ray.is_initialized():
        return
    set_unset(DRIVER_ENV)
    with _interrupts_wait():
        _init_ray()
    context = ray.data.DataContext.get_current()
    # Both delay tasks whose outputs may be large; ours return one short line. With the reservation Ray 2.60 ran 1.4 of
    # two tasks that fit; without it, the ratio let one actor of two work as soon as rows had come back.
    context.op_resource_reservation_enabled = False
    context.downstream_capacity_backpressure_ratio = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Delay Ctrl-C until the block ends: while Ray starts, one of its handlers may swallow the signal."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a background process ignores Ctrl-C; leave that as it is
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def _init_ray() -> None:
    if is_local():
        local_ray.init_ray()
    else:
        _refuse_no_cluster(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=True, logging_level="warning", runtime_env={"env_vars": WORKER_ENV})


def _refuse_no_cluster(address: str) -> None:
    """Raise StageError if the address is not a Ray head: Ray itself would retry for minutes, ignoring Ctrl-C.

    The address is host:port when a stage runs on the cluster itself: in a job, under Slurm, on a head node.
    """
    if address == "auto":
        return
    advice = "to submit jobs to a cluster, set its dashboard, http://host:8265; without RAY_ADDRESS, Ray starts locally"
    try:
        where = urlsplit(f"//{address}")
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=ANSWER_S):
            pass
    except (OSError, ValueError) as error:
        raise StageError(f"RAY_ADDRESS={address} is not a Ray head ({error}); {advice}") from None
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Ray does not use proxies either
    try:
        direct.open(f"http://{address}/", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, HTTPException):
        return  # a Ray head speaks another protocol
    raise StageError(f"RAY_ADDRESS={address} is a web server, perhaps the dashboard: use http://{address}; {advice}")


def place_rows(count: int) -> ray.data.Dataset:
    """Return a block for each place 0 to count - 1, with one row, `id`.

    This process makes them: range would read them in a task, which needs a process and a CPU beside the actors', and
    from_arrow runs a task for each to ask for its size.
    """
    return ray.data.from_items([{"id": place} for place in range(count)], override_num_blocks=count)


def run_units(
    stage: Stage,
    kind: str,
    units: Sequence[Unit],
    *,
    worker: Callable[[], Callable[[Unit], Record]],
    each: TaskResources,
    key: str,
    actors: int | None = None,
) -> list[Record]:
    """Run the units that the store does not have yet; return the records of all units, in the order given.

    kind: folder of parts/ for the results.
    worker: creates the function that runs one unit. Called once per actor if `actors` is set (for models), otherwise
    once per task. each: what Ray reserves for a task or an actor; `key` is its section in params.yaml.
    A failing unit fails the stage; units that finished before it stay stored. Where memory is short, it waits.
    """
    groups = [[unit] for unit in units]
    alone = partial(_one_by_one, worker)
    return run_groups(stage, kind, groups, worker=alone, each=each, key=key, actors=actors)


def run_groups(
    stage: Stage,
    kind: str,
    groups: Sequence[Sequence[Unit]],
    *,
    worker: Callable[[], Work],
    each: TaskResources,
    key: str,
    actors: int | None = None,
) -> list[Record]:
    """As `run_units`, for units that share much of their work, such as one file's pictures.

    The worker's function runs all units of a group that the store does not have, and returns their records in order.
    Groups start in the order given.
    """
    units = [unit for group in groups for unit in group]
    group_of = [place for place, group in enumerate(groups) for _ in group]
    records = dict(enumerate(stage.store.find_units([(kind, unit.name) for unit in units])))
    pending = [index for index, record in records.items() if record is None]
    print(f"{kind}: {len(units) - len(pending)} of {len(units)} parts are already there, {len(pending)} to do")
    write_plan(stage.store, stage.title, kind, [unit.name for unit in units], total=len(units))
    if pending:
        start_ray()
        patience = Patience(stage.title, _fewer(key, actors))
        with progress_bar(kind, total=len(pending), unit="part") as bar:
            while pending:
                todo = [list(indices) for _, indices in groupby(pending, key=group_of.__getitem__)]
                work = [[units[index] for index in indices] for indices in todo]
                try:
                    for place, found in _results(stage, work, worker, each, key, actors):
                        records.update(zip(todo[place], found, strict=True))
                        bar.update(len(found))
                except RayError as error:
                    if (problem := shortage(error)) is None:
                        raise
                    patience.wait(problem, done=bar.n)
                    for index in pending:  # a part may have been stored whose record did not arrive
                        records[index] = records[index] or stage.store.find_unit(kind, units[index].name)
                pending = [index for index in pending if records[index] is None]
                bar.update(bar.total - len(pending) - bar.n)
    return [record for record in records.values() if record is not None]


def _one_by_one(worker: Callable[[], Callable[[Unit], Record]]) -> Work:
    work = worker()
    return lambda units: [work(unit) for unit in units]


def _fewer(key: str, actors: int | None) -> str:
    """Return the advice for nodes that are low on memory."""
    return f"lower {key}.actors" if actors else f"raise {key}.per_shard.memory_gib, so that fewer tasks run at a time"


def _results(
    stage: Stage,
    groups: Sequence[Sequence[Unit]],
    worker: Callable[[], Work],
    each: TaskResources,
    key: str,
    actors: int | None,
) -> Iterator[tuple[int, list[Record]]]:
    """Run the groups; yield each one's place among them and its records. Raises StageError if one fails."""
    rows = place_rows(len(groups))
    wanted = ray_resources(each)
    options = {"num_cpus": wanted["CPU"], "num_gpus": wanted.get("GPU"), "memory": wanted.get("memory")}
    if actors is None:
        refuse_unmet(stage.title, Demand(each, f"{key}.per_shard"))
        results = rows.map(_task(groups, worker), **options)
    else:
        count = min(actors, len(groups))
        refuse_unmet(stage.title, Demand(each, f"{key}.per_actor", count, f"{key}.actors"))
        actor = _actor_class(groups, worker, stage.title, _fewer(key, actors))
        results = rows.map(actor, compute=ActorPoolStrategy(size=count), **options)
    for row in results.iter_rows():
        if row["error"]:
            raise StageError(row["error"])
        yield row["id"], [record_from(record) for record in json.loads(row["records"])]


def torch_device(each: ActorResources) -> Any:
    """Return the calling actor's torch.device. Raises StageError if torch does not see the GPU that Ray assigned."""
    import torch

    if not each.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError(
            f"Ray assigned a GPU of node {ray.util.get_node_ip_address()}, where torch {torch.__version__} sees none; "
            "install a CUDA build that fits its driver (`pbe doctor --gpu` there), or set gpus: 0 in params.yaml"
        )
    return torch.device("cuda")


def _task(groups: Sequence[Sequence[Unit]], worker: Callable[[], Work]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def run(row: dict[str, Any]) -> dict[str, Any]:
        return _result(worker, groups, row["id"])

    return run


def _actor_class(groups: Sequence[Sequence[Unit]], worker: Callable[[], Work], title: str, advice: str) -> type:
    class UnitActor:
        def __init__(self) -> None:
            try:
                wait_if_restarted(title, advice)
                self._work, self._error = worker(), ""
            except UserError as error:  # if raised here, Ray would restart the actor forever
                self._error = with_cure(error)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if self._error:
                return {"id": row["id"], "records": "", "error": self._error}
            return _result(lambda: self._work, groups, row["id"])

    return UnitActor


def _result(make: Callable[[], Work], groups: Sequence[Sequence[Unit]], index: int) -> dict[str, Any]:
    """Return the records as JSON, or the message of a user error: Ray Data would lose the type of an exception."""
    try:
        records = [asdict(record) for record in make()(groups[index])]
        return {"id": index, "records": json.dumps(records), "error": ""}
    except UserError as error:
        return {"id": index, "records": "", "error": with_cure(error)}
