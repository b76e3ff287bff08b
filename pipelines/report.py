"""report: reports/index.html, one file that opens anywhere: no script, nothing fetched, pictures inside.

What it says about a run is computed from the run: the wording follows params.yaml, and the list of deviations from
the paper holds only those that the settings have. Numbers come from metrics.json as evaluate wrote them; only the
paired differences are computed here. The page is pipelines/reporting/page.html.j2.
"""

import base64
import csv
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pbe.config import Params
from pbe.data import images
from pbe.data.boxes import area_frac
from pbe.data.captions import caption
from pbe.data.contact import with_hole
from pbe.data.filter import RULES, FilterConfig
from pbe.data.masks import HOLE_KINDS, hole_kinds_of, hole_of
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.schema import CAPTION_FORMS, IMAGE_REASONS, CaptionForm, HoleKind
from pbe.data.slots import slot_files
from pbe.errors import printable
from pbe.evaluate.bench.scopes import has_scope
from pbe.evaluate.grid import fill_rows, sweep_fills
from pbe.evaluate.metrics.intervals import Estimate
from pbe.store import File, Manifest, Record, Store, load_manifest, write_whole
from pbe.train.settings import TrainConfig
from pipelines.reporting.charts import areas_svg, classes_svg, loss_svg, sweep_svg
from pipelines.reporting.deviations import deviations
from pipelines.reporting.metric_glossary import bars, glossary, how_to_read, n_text
from pipelines.reporting.published import table_1
from pipelines.reporting.summary import (
    Result,
    Scope,
    caption_label,
    estimate_from,
    estimate_text,
    headline_metrics,
    load_results,
    read_json,
    seen_in_training,
)
from pipelines.reporting.user_study import user_study
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import DATA_STAGES, Stage, StageError, output_folder

DRAWS, DRAWS_PER_ROW = 16, 8  # augmented draws that are shown of one reference
COLOURS = 8  # of methods, on the page
COLUMNS = 12  # pictures per row of a grid
PICTURE_PX = 128  # larger pictures are scaled down to this side
PICTURE_QUALITY = 90
CLASSES = 15  # in the chart of classes
LISTED = 24  # dropped photos and credits listed; more are only counted
FEW_PHOTOS = 20  # below this many photos the bootstrap interval is clearly too narrow


HOLE_NAMES: dict[HoleKind, str] = {"box": "box", "bezier": "Bezier", "segmentation": "segmentation"}
# The paper's Table 3, from its first row to its last; other variants and the baselines follow.
TABLE_3 = {
    "baseline": "baseline",
    "prior": "+ prior",
    "augmentation": "+ augmentation",
    "bottleneck": "+ bottleneck",
    "full": "+ classifier-free guidance (full)",
}


@dataclass(frozen=True)
class TrainedVariant:
    """Training results of one variant."""

    name: str
    cfg: TrainConfig
    trained: dict[str, Any]
    history: list[dict[str, float]]


def main(stage: Stage) -> None:
    data = {name: load_manifest(stage.input(name)) for name in DATA_STAGES}
    trained = [_load_variant(stage, name) for name in stage.params.variants]
    results, card = load_results(stage.root, stage.params)
    paired = read_json(output_folder(stage.root, "evaluate") / "paired.json", "evaluate")
    bench = load_manifest(stage.input("bench"))
    extractor = stage.params.evaluate.extractors[0].kind
    scope = (stage.params.edit.holes[0], "exemplar")
    first = next(iter(next(iter(results.values())).scopes[scope].values()))
    all_areas, kept_areas, classes = _box_statistics(stage, data)
    template = page_environment().get_template("page.html.j2")
    html = template.render(
        params=stage.params,
        trained=trained,
        results=list(results.values()),
        card=card,
        bench=bench,
        recall=seen_in_training(stage.params),
        extractor=extractor,
        extractor_conditions=extractor == stage.params.encode.backbone.kind,
        data=data,
        counts={name: dict(manifest.counts) for name, manifest in data.items()},
        first=first,
        tables=[result_table(results, paired, hole, extractor) for hole in stage.params.edit.holes],
        table_1=table_1(stage.params, card, {name: results[name] for name in table_order(list(results))}),
        user_study=user_study(stage.root, results),
        baseline_notes=baseline_notes(),
        colours=colours(results),
        few_photos=FEW_PHOTOS,
        headline=[
            (*how_to_read(metric), hole, reference, bars([(r.name, r.scopes[hole, reference][metric]) for r in found]))
            for metric, hole, reference in _cards(stage.params, extractor)
            if (found := [r for r in results.values() if metric in r.scopes.get((hole, reference), {})])
        ],
        captioned=_captioned(stage, results, paired, extractor),
        grids=list(_grids(stage, results)),
        sweep=_sweep(stage, extractor),
        triplets=_triplet_rows(stage, data["materialize"]),
        augmented=augmentation_rows(stage.store, data["materialize"], seed=stage.params.seed),
        loss_svg=Markup(loss_svg({r.name: r.history for r in trained})),
        metrics=metric_groups(results, [found.kind for found in stage.params.evaluate.extractors]),
        filtered=filter_table(data["filter"].counts, stage.params.filter),
        areas_svg=Markup(areas_svg(all_areas, kept_areas)),
        classes_svg=Markup(classes_svg(classes)),
        dropped=list(dropped_photos(stage, data)),
        dropped_total=data["ingest"].counts["images_rejected"] + data["materialize"].counts["images_rejected"],
        credits=_credits(stage, data["ingest"]),
        deviations=deviations(stage.params, train_photos=data["materialize"].counts["images_kept"]),
        provenance=provenance_tags(stage.root),
        timing={r.name: timing(r.history) for r in trained},
    )
    target = stage.root / "reports" / "index.html"
    page = html.encode()
    write_whole(target, page)
    print(f"report: {target} ({len(page) / 1e6:.1f} MB)")


def page_environment() -> Environment:
    """Jinja as the page uses it: text from data is never markup, nor turns the direction of the text around it."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def baseline_notes() -> dict[str, dict[str, str]]:
    """What the page says of each kind of baseline, and how it differs from the method it is named after."""
    return yaml.safe_load((Path(__file__).parent / "reporting" / "baselines.yaml").read_text())


def _load_variant(stage: Stage, name: str) -> TrainedVariant:
    folder = output_folder(stage.root, "train", name)
    if not (folder / "loss.csv").is_file():
        raise StageError(f"{folder / 'loss.csv'}: not there; run `dvc repro train@{name}` first")
    with (folder / "loss.csv").open(newline="") as stream:
        history = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    trained = read_json(folder / "manifest.json", f"train@{name}")
    return TrainedVariant(name, stage.params.train_variant(name), trained, history)


# -- numbers -------------------------------------------------------------------------------------------------------


def table_order(names: Sequence[str]) -> list[str]:
    """Sort rows in Table 3's order, others after them."""
    known = [name for name in TABLE_3 if name in names]
    return known + [name for name in names if name not in known]


def row_label(name: str, names: Collection[str]) -> str:
    """Return the paper's name of a row. Its "+" means one thing more than in the row above, so the rows above must be
    there, except +prior, which needs Stable Diffusion."""
    above = [row for row in takewhile(lambda row: row != name, TABLE_3) if row != "prior"]
    return TABLE_3.get(name, name) if all(row in names for row in above) else name


def colours(names: Iterable[str]) -> dict[str, int]:
    """Return the colour index of every method."""
    return {name: index % COLOURS for index, name in enumerate(names)}


def result_table(results: Mapping[str, Result], paired: Mapping[str, Any], hole: str, extractor: str) -> dict[str, Any]:
    """One row a method, in the paper's layout, for exemplars in one kind of hole; p-values against `full`."""
    scope = (hole, "exemplar")
    shown = {name: result for name, result in results.items() if scope in result.scopes}
    columns = [
        (metric, label)
        for metric, label in headline_metrics(extractor).items()
        if any(metric in result.scopes[scope] for result in shown.values())
    ]
    rows = []
    most = max((next(iter(result.scopes[scope].values())).n for result in shown.values()), default=0)
    for name in table_order(list(shown)):
        numbers = shown[name].scopes[scope]
        tests = paired["methods"][name].get(hole, {}).get("exemplar", {})
        cells = _cells(numbers, {} if name == paired["against"] else tests, columns)
        label = row_label(name, shown)
        n = next(iter(numbers.values())).n
        if n != most:
            label += f" (N = {n} of {most})"
        if "not_compared" in paired["methods"][name]:
            label += f" (not compared: {paired['methods'][name]['not_compared']})"
        rows.append({"name": name, "label": label, "cells": cells})
    against = paired["against"]
    return {"hole": hole, "columns": [label for _, label in columns], "rows": rows, "against": against}


def _cells(
    numbers: Mapping[str, Estimate], tests: Mapping[str, Any], columns: Sequence[tuple[str, str]]
) -> list[dict[str, str]]:
    return [
        {
            "text": estimate_text(numbers[metric]) if metric in numbers else "",
            "p": p_text(tests[metric]["p_value"]) if metric in tests else "",
        }
        for metric, _ in columns
    ]


def caption_table(
    results: Mapping[str, Result], paired: Mapping[str, Any], hole: str, extractor: str
) -> dict[str, Any] | None:
    """The paper's Fig. 8 in numbers: a row for each form of caption that a method was given, then the exemplar itself.

    None if no method reads captions. Each is scored against the exemplar that it describes; p-values as result_table.
    """
    found = [
        (name, form, result.scopes[hole, form])
        for name, result in results.items()
        for form in CAPTION_FORMS
        if (hole, form) in result.scopes
    ]
    if not found:
        return None
    against = paired["against"]
    rows = [*found, (against, "exemplar", results[against].scopes[hole, "exemplar"])]
    columns = [
        (metric, label)
        for metric, label in headline_metrics(extractor).items()
        if any(metric in numbers for *_, numbers in found)  # the gains are of exemplars alone
    ]
    lines = [
        {
            "name": name,
            "label": caption_label(name, form),
            "cells": _cells(
                numbers,
                {} if form == "exemplar" else paired["methods"][name].get(hole, {}).get(form, {}),
                columns,
            ),
        }
        for name, form, numbers in rows
    ]
    return {"hole": hole, "columns": [label for _, label in columns], "rows": lines, "against": against}


def p_text(p_value: float) -> str:
    return f"p {p_value:.3f}" if p_value >= 0.0015 else "p 0.001"


def metric_groups(results: Mapping[str, Result], extractors: Sequence[str]) -> list[dict[str, Any]]:
    """One group a kind of metric, in the order of the glossary; in it a table per extractor, of methods by scopes."""
    scopes: list[Scope] = list(dict.fromkeys(scope for result in results.values() for scope in result.scopes))
    groups: dict[str, dict[str, Any]] = {}
    metrics = dict.fromkeys(m for result in results.values() for found in result.scopes.values() for m in found)
    for metric in metrics:
        label, extractor, unit, sentence = how_to_read(metric)
        group = groups.setdefault(label, {"label": label, "unit": unit, "sentence": sentence, "lines": []})
        for name, result in results.items():
            found = {scope: result.scopes[scope][metric] for scope in scopes if metric in result.scopes.get(scope, {})}
            if found:
                group["lines"].append(
                    {
                        "extractor": extractor,
                        "method": name,
                        "values": [estimate_text(found[scope]) if scope in found else "" for scope in scopes],
                        "n": ", ".join(sorted({n_text(value, result.chances.get(metric)) for value in found.values()})),
                    }
                )
    for group in groups.values():
        group["scopes"] = [f"{reference}, {hole} hole" for hole, reference in scopes]
        group["lines"].sort(
            key=lambda line: extractors.index(line["extractor"]) if line["extractor"] in extractors else -1
        )
    return [groups[entry.label] for entry in glossary() if entry.label in groups]


def _cards(params: Params, extractor: str) -> list[tuple[str, str, str]]:
    """Metric, hole and reference of the three cards."""
    hole = params.edit.holes[0]
    own = [(f"exemplar_gain_{extractor}", hole, "own")] if "own" in params.edit.references else []
    return [(f"exemplar_gain_{extractor}", hole, "exemplar"), *own, ("colour_gain", hole, "exemplar")]


def timing(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median seconds per step, milliseconds of it spent waiting for data, and rows per second; {} without points."""
    if not history:
        return {}
    median = {key: statistics.median(row[key] for row in history) for key in ("step_s", "data_s", "rows_per_s")}
    return {"step_s": median["step_s"], "data_ms": 1000 * median["data_s"], "rows_per_s": median["rows_per_s"]}


# -- pictures ------------------------------------------------------------------------------------------------------


def evenly(count: int, total: int) -> list[int]:
    """Return at most `count` of the indices 0..total-1, evenly spaced, without repeats."""
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()] if total else []


def picture_uri(picture: np.ndarray) -> str:
    """(h, w, 3) uint8 to a data: URI, not larger than PICTURE_PX on its longer side."""
    height_px, width_px = picture.shape[:2]
    scale = PICTURE_PX / max(height_px, width_px)
    if scale < 1:
        picture = images.resize(picture, width_px=round(width_px * scale), height_px=round(height_px * scale))
    return "data:image/jpeg;base64," + base64.b64encode(images.encode_jpeg(picture, PICTURE_QUALITY)).decode()


def _grids(stage: Stage, results: Mapping[str, Result]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A title and rows of pictures per scope: the same inputs, and what each method makes of them."""
    file = load_manifest(stage.input("bench")).files("bench")[0]
    bench = stage.store.read_table(file).to_pylist()
    scopes = dict.fromkeys(
        scope for result in results.values() for scope in result.scopes if scope[1] not in CAPTION_FORMS
    )
    shown = {scope: _evenly_of(bench, scope) for scope in scopes}
    ids = {item["bench_id"] for items in shown.values() for item in items}
    edits = {name: _edits_of(stage, name, ids) for name in results}
    for (hole, reference), items in shown.items():
        names = table_order([name for name in results if (hole, reference) in results[name].scopes])
        fills = {name: edits[name].get((hole, reference), {}) for name in names}
        yield f"{reference} reference, {hole} hole", picture_rows(items, fills, hole=hole, reference=reference)


def _evenly_of(bench: Sequence[Mapping[str, Any]], scope: Scope) -> list[Mapping[str, Any]]:
    """At most COLUMNS rows of BENCH that have this hole and this reference, evenly spaced."""
    having = [item for item in bench if has_scope(item, *scope)]
    return [having[index] for index in evenly(COLUMNS, len(having))]


def _captioned(
    stage: Stage, results: Mapping[str, Result], paired: Mapping[str, Any], extractor: str
) -> dict[str, Any] | None:
    """Captions of growing precision beside the exemplar that they describe, on the same items; None without any."""
    hole = stage.params.edit.holes[0]
    table = caption_table(results, paired, hole, extractor)
    if table is None:
        return None
    file = load_manifest(stage.input("bench")).files("bench")[0]
    items = _evenly_of(stage.store.read_table(file).to_pylist(), (hole, "exemplar"))
    ids, against = {item["bench_id"] for item in items}, paired["against"]
    fills: dict[str, Mapping[str, bytes]] = {}
    forms: dict[str, CaptionForm] = {}
    for name, result in results.items():
        if any((hole, form) in result.scopes for form in CAPTION_FORMS):
            edits = _edits_of(stage, name, ids)
            for form in CAPTION_FORMS:
                if (hole, form) in edits:
                    fills[caption_label(name, form)], forms[caption_label(name, form)] = edits[hole, form], form
    fills[caption_label(against, "exemplar")] = _edits_of(stage, against, ids)[hole, "exemplar"]
    return {"table": table, "rows": picture_rows(items, fills, hole=hole, reference="exemplar", forms=forms)}


def picture_rows(
    items: Sequence[Mapping[str, Any]],
    fills: Mapping[str, Mapping[str, bytes]],
    *,
    hole: str,
    reference: str,
    forms: Mapping[str, CaptionForm] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """`fill_rows` as the page shows them. forms: of captions, by the label of the row that was filled from them."""
    rows = []
    for number, (label, pictures) in enumerate(fill_rows(items, fills, hole_kind=hole, reference_kind=reference)):
        shown = [
            (picture_uri(picture), f"{label}, {item['bench_id']}, {_said(item, forms.get(label))}")
            for item, picture in zip(items, pictures, strict=True)
            if picture is not None
        ]
        kind = "start" if number == 0 else "edit" if label in fills else ""
        rows.append({"label": label, "kind": kind, "pictures": shown})
    return rows


def _said(item: Mapping[str, Any], form: CaptionForm | None) -> str:
    """What a row of BENCH shows: its label, or the caption that was given."""
    if form is None:
        return item["label_name"]
    return caption(item["label_name"], form, images.decode(item["exemplar"]), written=item.get("exemplar_caption"))


def _edits_of(stage: Stage, method: str, bench_ids: set[str]) -> dict[Scope, dict[str, bytes]]:
    """Return the edits of the first seed by hole and reference kind, then by bench id."""
    out: dict[Scope, dict[str, bytes]] = {}
    for file in load_manifest(output_folder(stage.root, "edit", method) / "manifest.json").files("edits"):
        for edit in stage.store.read_table(file).to_pylist():
            if edit["bench_id"] in bench_ids:
                found = out.setdefault((edit["hole_kind"], edit["reference_kind"]), {})
                found.setdefault(edit["bench_id"], edit["edit"])
    return out


def _sweep(stage: Stage, extractor: str) -> dict[str, Any]:
    """Curves over the guidance scale, the spread over noises, and both grids."""
    found = read_json(stage.input("sweep").with_name("metrics.json"), "sweep")
    manifest = load_manifest(stage.input("sweep"))
    tables = {unit.unit: unit for unit in manifest.units}
    edits = {
        name: [row for unit in units for row in stage.store.read_table(tables[unit].file("edits")).to_pylist()]
        for name, units in manifest.config["edits"].items()
    }
    bench = stage.store.read_table(load_manifest(stage.input("bench")).files("bench")[0]).to_pylist()
    grids = {}
    for name, fills in sweep_fills(edits).items():
        items = [row for row in bench if row["bench_id"] in next(iter(fills.values()))]
        items = [items[index] for index in evenly(COLUMNS, len(items))]
        grids[name] = picture_rows(items, fills, hole=found["hole"], reference="exemplar")
    scales = sorted(found["scales"], key=float)  # JSON sorts them as text
    first = found["scales"][scales[0]]
    columns = {metric: label for metric, label in headline_metrics(extractor).items() if metric in first}
    curves = {
        label: {scale: estimate_from(found["scales"][scale][metric]) for scale in scales}
        for metric, label in columns.items()
    }
    tests = found["paired"]["scales"]
    rows = [
        (
            label,
            [
                (
                    estimate_text(curves[label][scale]),
                    p_text(tests[scale][metric]["p_value"])
                    if scale != found["paired"]["against"] and metric in tests[scale]
                    else "",
                )
                for scale in scales
            ],
        )
        for metric, label in columns.items()
    ]
    spreads = [
        (how_to_read(metric), estimate_text(estimate_from(v)), n_text(estimate_from(v)))
        for metric, v in sorted(found["diversity"].items(), key=lambda item: item[1]["extractor"] != extractor)
    ]
    return {
        **{key: found[key] for key in ("variant", "hole", "diversity_scale")},
        "n": n_text(next(iter(curves.values()))[scales[0]]),
        "against": found["paired"]["against"],
        "scales": scales,
        "rows": rows,
        "svg": Markup(sweep_svg(curves)),
        "spreads": spreads,
        "grids": grids,
    }


def _triplet_rows(stage: Stage, triplets: Manifest) -> list[dict[str, Any]]:
    """Return triplets of evenly spaced slots, with a different photo per slot."""
    slots = slot_files(triplets)
    chosen = evenly(COLUMNS, len(slots))
    rows = []
    for number, slot in enumerate(chosen):
        file, offset = _row_of(slots[slot], number * sum(f.rows for f in slots[slot]) // len(chosen))
        rows.append(stage.store.read_table(file).slice(offset, 1).to_pylist()[0])

    def hole(row: dict[str, Any], kind: HoleKind) -> np.ndarray:
        source = images.decode(row["source"])
        return with_hole(source, hole_of(row, kind, source))

    # what a row may lack: an object's mask, a pair
    kinds = [kind for kind in HOLE_KINDS if all(kind in hole_kinds_of(row) for row in rows)]
    pictures = {f"{HOLE_NAMES[kind]} hole": partial(hole, kind=kind) for kind in kinds}
    pictures["reference"] = partial(_picture, name="reference")
    if all(row.get("pair_reference") for row in rows):
        pictures["reference of the pair"] = partial(_picture, name="pair_reference")
    return [
        {
            "label": label,
            "kind": "",
            "pictures": [(picture_uri(cut(row)), f"{label}, {row['image_id']}, {row['label_name']}") for row in rows],
        }
        for label, cut in pictures.items()
    ]


def _picture(row: dict[str, Any], name: str) -> np.ndarray:
    return images.decode(row[name])


def augmentation_rows(store: Store, triplets: Manifest, *, seed: int) -> list[dict[str, Any]]:
    """Return the first reference of the first slot, clean, then DRAWS draws with the generators that encode uses."""
    file, offset = _row_of(slot_files(triplets)[0], 0)
    columns = ["image_id", "slot", "label_name", "reference"]
    row = store.read_table(file, columns=columns).slice(offset, 1).to_pylist()[0]
    clean, augmenter = images.decode(row["reference"]), make_augmenter()

    def picture(draw: int) -> tuple[str, str]:
        rng = row_rng(seed, row["image_id"], row["slot"], "reference", draw)
        drawn = augment_reference(clean, augmenter=augmenter, rng=rng) if draw else clean
        label = f"augmented reference, draw {draw}" if draw else "clean reference"
        return picture_uri(drawn), f"{label}, {row['image_id']}, {row['label_name']}"

    rows = [{"label": "clean", "kind": "", "pictures": [picture(0)]}]
    for first in range(1, DRAWS + 1, DRAWS_PER_ROW):
        last = first + DRAWS_PER_ROW - 1
        pictures = [picture(draw) for draw in range(first, last + 1)]
        rows.append({"label": f"draws {first} to {last}", "kind": "", "pictures": pictures})
    return rows


def _row_of(files: Sequence[File], index: int) -> tuple[File, int]:
    """File and offset of row `index` of the files laid end to end."""
    for file in files:
        if index < file.rows:
            return file, index
        index -= file.rows
    raise AssertionError("index beyond the last row")


# -- data ----------------------------------------------------------------------------------------------------------


def dropped_photos(stage: Stage, data: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
    """Photo and reason, for the first LISTED photos that ingest or materialize dropped."""
    found = 0
    shards = zip(*(data[name].units for name in ("ingest", "filter", "materialize")), strict=True)
    for ingested, filtered, cut in shards:
        photos = [
            row
            for record in (ingested, cut)
            for row in stage.store.read_table(record.file("rejects")).to_pylist()
            if row["reason"] in IMAGE_REASONS
        ]
        boxes = _rejects_by_photo(stage, filtered) if photos else {}
        for row in photos:
            if found == LISTED:
                return
            found += 1
            yield row["key"], _reason(row, boxes.get(row["key"], []))


def _rejects_by_photo(stage: Stage, filtered: Record) -> dict[str, list[dict[str, str]]]:
    out: dict[str, list[dict[str, str]]] = {}
    for row in stage.store.read_table(filtered.file("rejects")).to_pylist():
        out.setdefault(row["key"].rpartition("#")[0], []).append(row)
    return out


def _reason(row: Mapping[str, str], boxes: Sequence[Mapping[str, str]]) -> str:
    if row["reason"] != "image_without_kept_box" or not boxes:
        return f"{row['reason'].replace('_', ' ')}: {row['detail']}"
    if len(boxes) == 1:
        return f"the filter dropped its only box: {boxes[0]['detail']}"
    reasons = [box["reason"].replace("_", " ") for box in boxes]
    return f"the filter dropped all {len(boxes)} boxes: " + ", ".join(
        f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons))
    )


def _credits(stage: Stage, ingested: Manifest) -> dict[str, Any]:
    """Return author, licence and origin of each photo if they are few, and the number of photos per licence."""
    licences: dict[str, int] = {}
    photos: list[dict[str, str]] = []
    for file in ingested.files("images"):
        columns = ["image_id", "license", "author", "source_url"]
        for row in stage.store.read_table(file, columns=columns).to_pylist():
            licence = row["license"] or "not stated by the source"
            licences[licence] = licences.get(licence, 0) + 1
            if len(photos) < LISTED:
                photos.append(_credit(row, licence))
    total = sum(licences.values())
    return {"photos": photos if total <= LISTED else [], "licences": dict(sorted(licences.items())), "total": total}


def _credit(row: Mapping[str, Any], licence: str) -> dict[str, str]:
    return {
        "photo": row["image_id"],
        "author": row["author"] or "not stated",
        "licence": licence,
        "origin": row["source_url"] or "your folder",
    }


def filter_table(counts: Mapping[str, int], cfg: FilterConfig) -> list[tuple[str, int]]:
    """Return how many boxes each rule removed, in the order of the rules, without those that are off."""
    found = [(rule, counts[f"rejected_{rule.reason}"]) for rule in RULES]
    return [(rule.reason.replace("_", " "), count) for rule, count in found if count or rule.is_on(cfg)]


def _box_statistics(
    stage: Stage, data: Mapping[str, Manifest]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int, int]]]:
    """Return relative areas of all boxes and of those kept, and (class, all, kept) of the most frequent classes."""
    columns = ["xmin", "xmax", "ymin", "ymax", "label_name"]
    areas: dict[str, list[np.ndarray]] = {"ingest": [], "filter": []}
    classes: dict[str, Counter[str]] = {"ingest": Counter(), "filter": Counter()}
    for name in areas:
        for file in data[name].files("boxes"):
            table = stage.store.read_table(file, columns=columns)
            areas[name].append(area_frac(*(table.column(column).to_numpy() for column in columns[:4])))
            classes[name].update(table.column("label_name").to_pylist())
    top = [(label, count, classes["filter"][label]) for label, count in classes["ingest"].most_common(CLASSES)]
    return np.concatenate(areas["ingest"]), np.concatenate(areas["filter"]), top
