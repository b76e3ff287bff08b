"""Plans of running stages, stored for `status`: units by name, or a training run.

    <storage>/plans/<stage>[-<variant>]/<kind>.json

A plan does not record progress: the parts and checkpoints show that.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pbe.store import Store

JOB_VARIABLE = "PBE_JOB"  # set inside a Ray job: its id


@dataclass(frozen=True)
class Plan:
    """The plan of a running stage. kind: folder of parts/, or "run". units: names of the units, or of the one run."""

    kind: str
    units: tuple[str, ...]
    total: int  # units, or training steps
    began: float  # seconds since 1970
    where: str  # host and process, or the job


def write_plan(store: Store, title: str, kind: str, units: Sequence[str], *, total: int) -> None:
    """Store a plan. title: the stage's name for `dvc repro`."""
    plan = Plan(kind, tuple(units), total, time.time(), who())
    store.write_bytes(f"{_folder(title)}/{kind}.json", json.dumps(asdict(plan)).encode())


def read_plans(store: Store, title: str) -> list[Plan]:
    """Return the plans of the stage's newest run; unreadable ones are skipped, as nothing depends on them."""
    plans = []
    for name in store.list_names(_folder(title)):
        try:
            raw = json.loads(store.read_bytes(f"{_folder(title)}/{name}"))
            plan = Plan(**{**raw, "units": tuple(raw["units"])})
            time.gmtime(plan.began)
        except (ValueError, TypeError, KeyError, OverflowError, OSError):
            continue
        if plan.units and isinstance(plan.total, int):
            plans.append(plan)
    return plans


def who() -> str:
    """Name this process for people: the Ray job, or host and process id."""
    return os.environ.get(JOB_VARIABLE) or f"{socket.gethostname()} (process {os.getpid()})"


def _folder(title: str) -> str:
    return f"plans/{title.replace('@', '-')}"
