"""status: the progress of each stage: parts and steps done, rejects, jobs, the last checkpoint, MLflow.

Reads parts and checkpoints from the storage, jobs from the cluster, counts and manifests from data/. Starts and
changes nothing.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pbe.config import Params, load_params
from pbe.errors import UserError
from pbe.places import repo_root, storage_uri, tracking_uri
from pbe.store import Store
from pbe.train.checkpoints import Run
from pipelines.reporting.summary import mlflow_command
from pipelines.runtime.environment import is_dashboard
from pipelines.runtime.logs import LOG_FOLDER
from pipelines.runtime.progress_records import Plan, read_plans
from pipelines.runtime.stage import STAGES, VARIANT_STAGES, output_folder
from pipelines.runtime.tracking import page_address

REJECTED = "rejected_"  # prefix of the counts by reason


def main() -> None:
    params, root, store = load_params(), repo_root(), Store(storage_uri())
    names = {stage: _titles(stage, params) for stage in STAGES}
    width = max(len(title) for titles in names.values() for title, _ in titles)
    print(f"storage  {store.uri}")
    for stage, titles in names.items():
        for title, variant in titles:
            try:
                lines = list(_lines(stage, title, variant, root, store))
            except (ValueError, TypeError, KeyError) as error:
                where = output_folder(root, stage, variant)
                lines = [f"unknown: a file in {where} or of its run is damaged: {type(error).__name__}: {error}"]
            print(f"{title:{width}}  {lines[0]}")
            for line in lines[1:]:
                print(f"{'':{width}}  {line}")
    for line in _jobs():
        print(line)
    print(f"MLflow   {mlflow_command(tracking_uri())}")


def _titles(stage: str, params: Params) -> list[tuple[str, str | None]]:
    names = params.variants if stage in VARIANT_STAGES else params.baselines if stage == "baseline" else None
    return [(stage, None)] if names is None else [(f"{stage}@{name}", name) for name in names]


def _lines(stage: str, title: str, variant: str | None, root: Path, store: Store) -> Iterator[str]:
    outputs = output_folder(root, stage, variant)
    last = {"report": root / "reports/index.html", "study": outputs / "plan.json"}
    finished = last.get(stage, outputs / "manifest.json").is_file()
    if stage == "train" and finished:
        yield from _trained(outputs / "manifest.json")
    else:
        yield "its results are here" if finished else "no results here yet"
    if (outputs / "counts.json").is_file() and (counts := _rejects(outputs / "counts.json")):
        yield counts
    for plan in read_plans(store, title):
        done = _steps(store, plan) if plan.kind == "run" else _parts(store, plan)
        if done or not finished:
            yield f"{done or 'nothing left to do'}; began {_time(plan.began)} by {plan.where}"
    if (logs := sorted((root / LOG_FOLDER / title.replace("@", "-")).glob("*.log"))) and not finished:
        yield f"log {logs[-1]}"


def _trained(manifest: Path) -> Iterator[str]:
    raw = json.loads(manifest.read_text())
    yield f"run {raw['run']}, {raw['steps']} steps, its model is here"
    yield f"MLflow run {page_address()}/#/runs/{raw['mlflow_run_id']}"


def _rejects(path: Path) -> str:
    counts = json.loads(path.read_text())
    why = {key: value for key, value in counts.items() if key.startswith(REJECTED) and value}
    return (
        "rejected: " + ", ".join(f"{value:,} {key.removeprefix(REJECTED)}" for key, value in why.items()) if why else ""
    )


def _parts(store: Store, plan: Plan) -> str:
    """Describe how many parts of a plan are stored; empty if all are."""
    there = set(store.list_files(f"parts/{plan.kind}"))  # one listing instead of thousands of requests
    done = sum(f"{name}/record.json" in there for name in plan.units)
    return "" if done == plan.total else f"{done:,} of {plan.total:,} {plan.kind} parts"


def _steps(store: Store, plan: Plan) -> str:
    run = Run(store, plan.units[0])
    if run.finished() is not None:
        return ""
    checkpoints = run.checkpoints()
    last = f"last checkpoint at step {checkpoints[-1].step:,}" if checkpoints else "no checkpoint yet"
    return f"run {run.name}: {last} of {plan.total:,}"


def _jobs() -> Iterator[str]:
    address = os.environ.get("RAY_ADDRESS", "")
    if not is_dashboard(address):
        return
    from pipelines.cluster.submit import running_jobs

    try:
        jobs = running_jobs(address)
    except UserError as error:
        yield f"jobs     {error}"
        return
    for job_id, status in jobs or [("none running", address)]:
        yield f"jobs     {job_id}  {status}"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
