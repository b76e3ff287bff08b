"""The job's side of a submission: check that the cluster can run it, and send the outputs back.

The checks run on the cluster itself: Python and Ray must match the submitting machine, storage and MLflow must not be
files of that machine, and every node must read what this one writes to the storage. A node that an autoscaler adds
later fails at its first part.
"""

import hashlib
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from pbe.errors import UserError, one_line
from pbe.places import tracking_uri
from pbe.store import Store
from pipelines.cluster.working_dir import BYTES_PACKAGES, MARK_VARIABLE, NODES, SUBMITTER_VARIABLE, versions_here
from pipelines.runtime.stage import Stage, StageError

NODE_ANSWER_S = 120  # its worker process has to start and may have to unpack the package


def check_cluster(stage: Stage) -> None:
    """Check the cluster before any work.

    Raises StageError or StoreError for another Python or Ray, for storage or MLflow that only the submitting machine
    has, or for storage that a node does not share.
    """
    _refuse_other_versions(json.loads(os.environ.get(SUBMITTER_VARIABLE, "{}")), versions_here())
    _refuse_other_storage(stage.store, os.environ.get(MARK_VARIABLE))
    _refuse_far_mlflow(tracking_uri())
    _refuse_unshared_storage(stage)


def send_outputs(stage: Stage, job_id: str) -> None:
    """Put the files of `stage.outputs` in the storage, then the marker that lists them.

    Raises StageError if the stage wrote none.
    """
    files = {path: sha256_of(stage.outputs / path) for path in files_below(stage.outputs)}
    if not files:
        raise StageError(f"stage {stage.name} wrote nothing in {stage.outputs}")
    stage.store.copy_tree_in(stage.outputs, f"jobs/{job_id}/outputs")
    stage.store.write_bytes(f"jobs/{job_id}/outputs.json", json.dumps({"files": files}, indent=1).encode())


def _refuse_other_versions(theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Raise StageError if Python or Ray differ; warn if other packages do. theirs: the submitter's; may be empty."""
    differ = {name: found for name, found in theirs.items() if ours.get(name) != found}
    said = ", ".join(f"{name} {ours.get(name, 'none')} here and {found} there" for name, found in differ.items())
    advice = "the image of the cluster and the environment that submits must come from one requirements.lock"
    if differ.keys() - set(BYTES_PACKAGES):
        raise StageError(f"the cluster and the machine that sent this job differ: {said}; {advice}")
    if differ:
        print(
            f"pbe: warning: the cluster and the machine that sent this job differ: {said}; results may differ in bits, "
            f"and {advice}",
            flush=True,
        )


def _refuse_other_storage(store: Store, mark: str | None) -> None:
    """Raise StageError unless the storage has the submitter's mark (None: it left none).

    The submitter cannot tell from the address: a tunnel to a remote dashboard is 127.0.0.1 to it.
    """
    if mark and not store.exists(f"{NODES}/{mark}"):
        raise StageError(
            f"PBE_STORAGE={store.uri} resolves to a different location on the cluster than on the submitting machine; "
            "use "
            "s3://bucket/prefix with one AWS_ENDPOINT_URL, or a folder that both see"
        )


def _refuse_far_mlflow(uri: str) -> None:
    where = urlsplit(uri)
    if where.scheme.split("+")[0] in ("sqlite", "file", "") and not Path(where.path).parent.is_dir():
        raise StageError(
            f"MLflow would write to {uri}, a file of the machine that sent this job; "
            "set MLFLOW_TRACKING_URI=http://your-server:5000 there"
        )


def _refuse_unshared_storage(stage: Stage) -> None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipelines.runtime.parts import start_ray

    start_ray()
    here = ray.get_runtime_context().get_node_id()
    stage.store.write_bytes(f"{NODES}/{here}", b"")
    known = set(stage.store.list_names(NODES))  # a node that has written there is not checked again
    probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
    asked = [
        (
            node["NodeManagerAddress"],
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                stage.store.uri, here, node["NodeID"]
            ),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in known
    ]
    for address, answer in asked:
        try:
            problem = ray.get(answer, timeout=NODE_ANSWER_S)
        except GetTimeoutError:
            problem = f"no answer within {NODE_ANSWER_S} s"
        except RayError:  # the node has gone, which Ray handles
            continue
        if problem:
            raise StageError(f"PBE_STORAGE={stage.store.uri} does not work on node {address}: {problem}")


def _probe(uri: str, driver: str, node: str) -> str:
    """Check a node's storage on that node; return the problem in one line, or "" if it can read and write there."""
    try:
        store = Store(uri)
        if not store.exists(f"{NODES}/{driver}"):
            return "it does not see what another node wrote there; use s3://bucket/prefix, or a folder that all share"
        store.write_bytes(f"{NODES}/{node}", b"")
    except (UserError, OSError) as error:
        return one_line(error)
    return ""


def files_below(folder: Path) -> list[str]:
    """Paths of all files below `folder`, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
