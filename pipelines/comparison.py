"""What MLflow shows side by side: edits of the same items of the bench, by every variant and baseline, and by every
scale of the sweep.

A run has the edits as a series of images, whose key is the same in all runs and whose step is the item's place in the
bench: MLflow shows one step of several runs, with a slider. Tags find the runs of one bench, and a saved view of
MLflow's page shows them: edits, settings that differ, scores. Without the view, the page writes every parameter above
each image.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe import track
from pbe.data.schema import BENCH, CAPTION_FORMS, require
from pbe.evaluate.grid import edit_beside_inputs, evenly_spaced
from pbe.places import tracking_uri
from pbe.store import File, digest, load_manifest
from pipelines.runtime.stage import Stage
from pipelines.runtime.tracking import page_address

ITEMS = 12  # of the bench, at most; those of the sweep too, by its default
LAYOUT = 1  # of edit_beside_inputs: raise it when the pictures look otherwise
TABLE, DETAIL, SWEEP = "table", "evaluate", "sweep"  # tag part_of: a row of the table, all its numbers, a scale
CARD_PX = 660  # two rows of pictures


def compared_items(stage: Stage, *, edited: Collection[str] | None = None) -> dict[int, dict[str, Any]]:
    """Return rows of BENCH by their place in it: evenly spaced among those with a hole of the first kind.

    edited: bench ids to choose from, where not all items have edits.
    """
    file = load_manifest(stage.input("bench")).files("bench")[0]
    bench = require(stage.store.read_table(file), BENCH, file.path)
    having = np.flatnonzero(bench.column(f"{_hole(stage)}_hole_mask").is_valid().to_numpy())
    if edited is not None:
        having = having[[name in edited for name in bench.column("bench_id").take(having).to_pylist()]]
    places = having[evenly_spaced(len(having), ITEMS)]
    return dict(zip(places.tolist(), bench.take(places).to_pylist(), strict=True))


def bench_tag(stage: Stage) -> str:
    """Return the tag `bench`: runs with the same one were scored on the same items."""
    return load_manifest(stage.input("bench")).files("bench")[0].sha256[:16]


def log_edits(
    stage: Stage, run_id: str, edits: Sequence[File], items: Mapping[int, Mapping[str, Any]], *, key: str
) -> None:
    """Log the first edit of each item by its exemplar, or by a caption of it. An item without an edit is left out.

    edits: files of EDITS. items: as `compared_items` returns them. Raises TrackError.
    """
    hole, places = _hole(stage), {item["bench_id"]: place for place, item in items.items()}
    wanted = pa.array(list(places))
    found: dict[tuple[str, str], bytes] = {}
    for file in edits:
        table = stage.store.read_table(file)
        for row in table.filter(pc.is_in(table["bench_id"], wanted)).to_pylist():
            if row["hole_kind"] == hole:
                found.setdefault((row["bench_id"], row["reference_kind"]), row["edit"])
    pictures = {}
    for name, place in places.items():
        edit = next((found[name, kind] for kind in ("exemplar", *CAPTION_FORMS) if (name, kind) in found), None)
        if edit is not None:
            pictures[place] = edit_beside_inputs(items[place], edit, hole_kind=hole)
    content = digest([LAYOUT, bench_tag(stage), sorted(places.values()), [file.sha256 for file in edits]])
    track.log_series(tracking_uri(), run_id, pictures, key=key, content=content)


def edits_key(stage: Stage) -> str:
    """Return the key of a method's edits; MLflow shows it among the scores of the same prefix."""
    return f"eval-{_hole(stage)}/edits"


def scale_key(stage: Stage, scale: str) -> str:
    """Return the key of a variant's edits at one guidance scale of the sweep."""
    return f"sweep-{_hole(stage)}/scale {scale}"


def save_table_view(stage: Stage) -> None:
    """Save the view of all methods scored on this bench, and print its address."""
    bench = bench_tag(stage)
    runs = f"tags.bench = '{bench}' and tags.part_of = '{TABLE}'"
    _save_view(stage, f"table-{bench[:8]}", f"bench {bench[:8]}", runs, [edits_key(stage)])


def save_sweep_view(stage: Stage, scales: Sequence[str]) -> None:
    """Save the view of all trainings that were swept on this bench, a column each, and print its address.

    The runs of single scales are not shown: MLflow folds them below the training's, and a view cannot unfold them.
    """
    bench = bench_tag(stage)
    keys = [scale_key(stage, scale) for scale in scales]
    _save_view(stage, f"sweep-{bench[:8]}", f"guidance scales, bench {bench[:8]}", f"tags.swept = '{bench}'", keys)


def _save_view(stage: Stage, view_id: str, name: str, runs: str, image_keys: Sequence[str]) -> None:
    """runs: a filter. image_keys: MLflow shows one as a picture of every run, several as rows of a table."""
    edits = {"type": "IMAGE", "imageKeys": image_keys, "step": 0, "showRunParams": False}
    settings = {
        "type": "DIFFERENCE",
        "chartName": "Settings that differ",
        "compareGroups": ["Parameters"],
        "showDifferencesOnly": True,
        "showChangeFromBaseline": False,
        "baselineColumnUuid": "",
    }
    sections = {"Edits": (edits, {"columns": 1, "cardHeight": CARD_PX}), "Settings": (settings, {"columns": 1})}
    state = {
        "searchFilter": runs,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": ["params.`diff`", "tags.`variant`"],
        "isAccordionReordered": True,  # else sections stand in the order of their names
        "compareRunSections": [
            {"uuid": title, "name": title, "display": True, "isReordered": True, **size}
            for title, (_, size) in sections.items()
        ],
        "compareRunCharts": [
            {"uuid": f"{title} 1", "metricSectionId": title, "deleted": False, "isGenerated": False, **chart}
            for title, (chart, _) in sections.items()
        ],
    }
    address = track.save_view(tracking_uri(), view_id=view_id, name=name, state=state)
    print(f"{stage.title}: side by side in MLflow: {page_address()}/{address}", flush=True)


def _hole(stage: Stage) -> str:
    return stage.params.edit.holes[0]  # others' results use box holes, which params.yaml then lists first
