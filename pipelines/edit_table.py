"""Groups of a table's edits in Ray Data actors, each with its own editor, as the edit stage has them.

On a cluster the table's pictures and the model must be at the same paths on every node. The driver writes the PNGs.
"""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from pbe.edit import Editor
from pbe.edit_table.results import Result
from pbe.edit_table.rows import Job
from pbe.edit_table.work import Work, edit_group
from pbe.errors import UserError
from pbe.settings import ActorResources
from pipelines.runtime.capacity import Demand, ray_resources, refuse_unmet
from pipelines.runtime.memory import wait_if_restarted
from pipelines.runtime.parts import place_rows, start_ray, torch_device
from pipelines.runtime.stage import StageError

TITLE = "pbe edit --table"


def edit_on_ray(groups: Sequence[tuple[Job, ...]], work: Work, *, actors: int) -> Iterator[list[Result]]:
    """Yield the results of each group as it is done. Raises StageError if no node holds an actor or no model opens."""
    if not groups:
        return
    start_ray()
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    each = ActorResources(cpus=1, gpus=gpus, memory_gib=0)
    count = min(actors, len(groups))
    refuse_unmet(TITLE, Demand(each, "an actor", count, "--actors"))
    wanted = ray_resources(each)
    results = place_rows(len(groups)).map(
        _actor_class(groups, work, each),
        compute=ActorPoolStrategy(size=count),
        num_cpus=wanted["CPU"],
        num_gpus=wanted.get("GPU"),
    )
    for row in results.iter_rows():
        if row["error"]:
            raise StageError(row["error"])
        yield pickle.loads(row["results"])


def _actor_class(groups: Sequence[tuple[Job, ...]], work: Work, each: ActorResources) -> type:
    class TableActor:
        def __init__(self) -> None:
            import torch

            wait_if_restarted(TITLE, "lower --actors")
            torch.set_num_threads(1)
            self._model = ""
            self._editor: Editor | None = None

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            group = groups[row["id"]]
            try:
                if self._editor is None or group[0].model != self._model:
                    self._editor = None  # frees the other model
                    self._editor = work.editor(group[0].model, torch_device(each).type)
                    self._model = group[0].model
                return {"results": pickle.dumps(edit_group(group, work, self._editor)), "error": ""}
            except UserError as error:  # of the model; Ray Data would lose its type
                return {"results": b"", "error": str(error)}

    return TableActor
