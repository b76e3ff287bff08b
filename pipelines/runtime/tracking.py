"""MLflow around a stage: asked before its work, told after its results are written."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pbe import track
from pbe.places import tracking_uri
from pipelines.runtime.environment import is_local
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage


def page_address() -> str:
    """Return where a browser finds MLflow: the tracking server, or what `make ui` starts."""
    uri = tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


@contextmanager
def after_results(stage: Stage) -> Iterator[None]:
    """Log what the stage has already written: an MLflow that fails now costs a line, not the stage."""
    try:
        yield
    except track.TrackError as error:
        here = "" if is_local() else "env -u RAY_ADDRESS "  # a finished job would not run again
        print(
            f"pbe: warning: {stage.title}: its results are written, but not logged to MLflow ({error}); later, "
            f"`{here}dvc repro -f -s {stage.title}` logs them, from the parts that are there",
            file=sys.stderr,
            flush=True,
        )


def training_run(stage: Stage, *, variant: str, run: str, run_id: str) -> str:
    """Return the MLflow run of a training, for what is measured of its model.

    If it is not there (deleted, or in another database), another one of the same training or a new one takes its place.
    """
    uri, identity = tracking_uri(), {"run": run}
    found = track.find_run(uri, run_id=run_id, identity=identity)
    if found is None:
        tags = {**provenance_tags(stage.root), "variant": variant, "storage": stage.store.uri}
        found = track.open_run(uri, name=variant, identity=identity, params={}, tags=tags)
        track.end_run(uri, found)
        print(f"{stage.title}: MLflow has no run {run_id} of {variant}; what is measured goes to a new one", flush=True)
    return found
