"""report: reports/index.html, one file that opens anywhere: no script, nothing fetched, pictures inside.

What it says about a run is computed from the run: the wording follows params.yaml, and the list of deviations from
the paper holds only those that the settings have. Numbers come from metrics.json as evaluate wrote them; only the
paired differences are computed here. The page is pipelines/report.html.j2.
"""

import base64
import csv
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pbe.config import Params, TrainConfig
from pbe.data import images
from pbe.data.boxes import area_frac
from pbe.data.contact import with_hole
from pbe.data.masks import unpack_mask
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.schema import FILTER_REASONS, IMAGE_REASONS
from pbe.data.slots import slot_files
from pbe.evaluate.intervals import Estimate, bootstrap_mean
from pbe.evaluate.items import EditedItem, edited_items
from pbe.store import File, Manifest, Record, Store, load_manifest
from pipelines.charts import areas_svg, classes_svg, loss_svg
from pipelines.deviations import deviations
from pipelines.provenance import provenance_tags
from pipelines.reading import HOW_TO_READ, bars, how_to_read, n_text
from pipelines.stage import DATA_STAGES, Stage, StageError, output_folder
from pipelines.summary import estimate_text, headline_metrics, load_metrics, read_json

DRAWS, DRAWS_PER_ROW = 16, 8  # augmented draws that are shown of one reference
COLUMNS = 12  # pictures per row of a grid
PICTURE_PX = 128  # larger pictures are scaled down to this side
PICTURE_QUALITY = 90
CLASSES = 15  # in the chart of classes
LISTED = 24  # dropped photos and credits named one by one; more are only counted
FEW_PHOTOS = 20  # below this many photos the bootstrap interval is clearly too narrow


@dataclass(frozen=True)
class VariantResult:
    """What train and evaluate left for one variant."""

    name: str
    cfg: TrainConfig
    trained: dict[str, Any]
    history: list[dict[str, float]]
    estimates: dict[str, Estimate]
    protocol: dict[str, Any]
    items: list[dict[str, Any]]
    manifest: Manifest


def main(stage: Stage) -> None:
    data = {name: load_manifest(stage.input(name)) for name in DATA_STAGES}
    results = [_load_variant(stage, name) for name in stage.params.variants]
    judge = stage.params.evaluate.judges[0]
    all_areas, kept_areas, classes = _box_statistics(stage, data)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    html = template.render(
        params=stage.params,
        results=results,
        judge=judge,
        judge_conditions=judge == stage.params.encode.backbone.kind,
        data=data,
        counts={name: dict(manifest.counts) for name, manifest in data.items()},
        first=results[0].estimates[f"own_gain_{judge}"],
        few_photos=FEW_PHOTOS,
        headline=[
            (name, *how_to_read(name), bars([(r.name, r.estimates[name]) for r in results]))
            for name in headline_metrics(judge)
        ],
        grids=[(r, _edit_rows(stage, r)) for r in results],
        triplets=_triplet_rows(stage, data["materialize"]),
        augmented=augmentation_rows(stage.store, data["materialize"], seed=stage.params.seed),
        loss_svg=Markup(loss_svg({r.name: r.history for r in results})),
        metrics=metric_groups(results, stage.params.evaluate.judges),
        differences=_differences(stage.params, results, [*headline_metrics(judge), "hole_psnr_db"]),
        filtered=filter_table(data["filter"].counts, stage.params.filter.model_dump()),
        areas_svg=Markup(areas_svg(all_areas, kept_areas)),
        classes_svg=Markup(classes_svg(classes)),
        dropped=list(dropped_photos(stage, data)),
        dropped_total=data["ingest"].counts["images_rejected"] + data["materialize"].counts["images_rejected"],
        credits=_credits(stage, data["ingest"]),
        deviations=deviations(stage.params, train_photos=data["materialize"].counts["images_kept"]),
        provenance=provenance_tags(stage.root),
        timing={r.name: timing(r.history) for r in results},
    )
    target = stage.root / "reports" / "index.html"
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(".index.html.tmp")
    beside.write_text(html, encoding="utf-8")
    beside.replace(target)
    print(f"report: {target} ({len(html.encode()) / 1e6:.1f} MB)")


def _load_variant(stage: Stage, name: str) -> VariantResult:
    estimates, protocol = load_metrics(stage.root, name)
    evaluated, trained = (output_folder(stage.root, part, name) for part in ("evaluate", "train"))
    for path, target in ((evaluated / "manifest.json", "evaluate"), (trained / "loss.csv", "train")):
        if not path.is_file():
            raise StageError(f"{path}: not there; run `dvc repro {target}@{name}` first")
    with (trained / "loss.csv").open(newline="") as stream:
        history = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    return VariantResult(
        name=name,
        cfg=stage.params.train_variant(name),
        trained=read_json(trained / "manifest.json", f"train@{name}"),
        history=history,
        estimates=estimates,
        protocol=protocol,
        items=read_json(evaluated / "items.json", f"evaluate@{name}"),
        manifest=load_manifest(evaluated / "manifest.json"),
    )


# -- numbers -------------------------------------------------------------------------------------------------------


def metric_groups(results: Sequence[VariantResult], judges: Sequence[str]) -> list[dict[str, Any]]:
    """One group a kind of metric, in the order of HOW_TO_READ; in it one line per judge, with each variant's value."""
    groups: dict[str, dict[str, Any]] = {}
    for name in {name: None for result in results for name in result.estimates}:
        label, judge, unit, sentence = how_to_read(name)
        found = {r.name: r.estimates[name] for r in results if name in r.estimates}
        group = groups.setdefault(label, {"label": label, "unit": unit, "sentence": sentence, "lines": []})
        group["lines"].append(
            {
                "judge": judge,
                "values": {variant: estimate_text(estimate) for variant, estimate in found.items()},
                "n": ", ".join(sorted({n_text(estimate) for estimate in found.values()})),
            }
        )
    for group in groups.values():
        group["lines"].sort(key=lambda line: judges.index(line["judge"]) if line["judge"] in judges else -1)
    return [groups[label] for label, _, _ in HOW_TO_READ.values() if label in groups]


def paired_difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metric: str, *, resamples: int, seed: int
) -> Estimate | None:
    """Mean of first - second over the same bench items, bootstrapped by photo; None when they do not share items."""
    theirs = {row["bench_id"]: row for row in second}
    if {row["bench_id"] for row in first} != theirs.keys() or any(metric not in row for row in (*first, *second)):
        return None
    values = np.array([row[metric] - theirs[row["bench_id"]][metric] for row in first])
    return bootstrap_mean(values, groups=[row["image_id"] for row in first], resamples=resamples, seed=seed)


def _differences(params: Params, results: Sequence[VariantResult], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The first variant against each other one. Benches with different bytes are not compared."""
    first, cfg = results[0], params.evaluate
    out = []
    for other in results[1:]:
        same = first.protocol["bench_sha256"] == other.protocol["bench_sha256"]
        rows = []
        for metric in metrics if same else ():
            found = paired_difference(first.items, other.items, metric, resamples=cfg.resamples, seed=cfg.seed)
            if found is not None:
                label, judge, unit, _ = how_to_read(metric)
                rows.append({"label": label, "unit": unit, "judge": judge, "bar": bars([("", found)])[0]})
        out.append({"other": other.name, "rows": rows})
    return out


def timing(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median seconds per step, milliseconds of it spent waiting for data, and rows per second; {} without points."""
    if not history:
        return {}
    median = {key: statistics.median(row[key] for row in history) for key in ("step_s", "data_s", "rows_per_s")}
    return {"step_s": median["step_s"], "data_ms": 1000 * median["data_s"], "rows_per_s": median["rows_per_s"]}


# -- pictures ------------------------------------------------------------------------------------------------------


def evenly(count: int, total: int) -> list[int]:
    """At most `count` of the indices 0..total-1, evenly spaced, without repeats."""
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()] if total else []


def picture_uri(picture: np.ndarray) -> str:
    """(h, w, 3) uint8 to a data: URI, not larger than PICTURE_PX on its longer side."""
    height_px, width_px = picture.shape[:2]
    scale = PICTURE_PX / max(height_px, width_px)
    if scale < 1:
        picture = images.resize(picture, width_px=round(width_px * scale), height_px=round(height_px * scale))
    return "data:image/jpeg;base64," + base64.b64encode(images.encode_jpeg(picture, PICTURE_QUALITY)).decode()


def _edit_rows(stage: Stage, result: VariantResult) -> list[dict[str, Any]]:
    """Six rows of pictures, as pbe.evaluate.grid.edit_grid has them, with their labels."""
    bench = stage.store.read_table(File(**result.manifest.config["bench"]))
    positions = [index for index, role in enumerate(bench.column("role").to_pylist()) if role == "item"]
    edits = [row for file in result.manifest.files("edits") for row in stage.store.read_table(file).to_pylist()]
    assert len(edits) == len(positions)
    chosen = evenly(COLUMNS, len(edits))
    rows = bench.take([positions[index] for index in chosen]).to_pylist()
    items = edited_items(rows, [edits[index] for index in chosen])
    pictures: list[tuple[str, str, Callable[[EditedItem], np.ndarray]]] = [
        ("photo", "start", lambda item: item.source),
        ("hole", "", lambda item: with_hole(item.source, item.hole_mask)),
        ("own reference", "start", lambda item: item.own_reference),
        ("edit with it", "edit", lambda item: item.own_edit),
        ("foreign reference", "start", lambda item: item.foreign_reference),
        ("edit with it", "edit", lambda item: item.foreign_edit),
    ]
    return [
        {
            "label": label,
            "kind": kind,
            "pictures": [
                (picture_uri(cut(item)), f"{label}, {item.bench_id}, {item.hole_kind} hole") for item in items
            ],
        }
        for label, kind, cut in pictures
    ]


def _triplet_rows(stage: Stage, triplets: Manifest) -> list[dict[str, Any]]:
    """Evenly spaced slots; from slot to slot another photo."""
    slots = slot_files(triplets)
    chosen = evenly(COLUMNS, len(slots))
    rows = []
    for number, slot in enumerate(chosen):
        file, offset = _row_of(slots[slot], number * sum(f.rows for f in slots[slot]) // len(chosen))
        rows.append(stage.store.read_table(file).slice(offset, 1).to_pylist()[0])

    def hole(row: dict[str, Any], kind: str) -> np.ndarray:
        source = images.decode(row["source"])
        return with_hole(
            source, unpack_mask(row[f"{kind}_hole_mask"], width_px=source.shape[1], height_px=source.shape[0])
        )

    pictures: list[tuple[str, Callable[[dict[str, Any]], np.ndarray]]] = [
        ("box hole", lambda row: hole(row, "box")),
        ("Bezier hole", lambda row: hole(row, "bezier")),
        ("reference", lambda row: images.decode(row["reference"])),
    ]
    return [
        {
            "label": label,
            "kind": "",
            "pictures": [(picture_uri(cut(row)), f"{label}, {row['image_id']}, {row['label_name']}") for row in rows],
        }
        for label, cut in pictures
    ]


def augmentation_rows(store: Store, triplets: Manifest, *, seed: int) -> list[dict[str, Any]]:
    """The first reference of the first slot, clean, and below it DRAWS draws, with the generators that encode has."""
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
    buckets = zip(*(data[name].units for name in ("ingest", "filter", "materialize")), strict=True)
    for ingested, filtered, cut in buckets:
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
    """Photos with author, licence and origin while they are few; how many have which licence."""
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


def filter_table(counts: Mapping[str, int], filters: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What each rule removed, in the order in which rules are asked; rules that are off are left out."""
    on = {"area_below_min", "area_above_max"} | {
        reason
        for reason, setting in (
            ("image_excluded", "exclude_images"),
            ("class_excluded", "exclude_classes"),
            ("class_excluded", "include_classes"),
            ("flag_excluded", "exclude_flags"),
            ("side_below_min", "min_side_px"),
            ("aspect_above_max", "max_aspect"),
            ("near_duplicate", "max_iou"),
        )
        if filters[setting]
    }
    found = {reason: counts[f"rejected_{reason}"] for reason in FILTER_REASONS}
    return [(reason.replace("_", " "), count) for reason, count in found.items() if count or reason in on]


def _box_statistics(
    stage: Stage, data: Mapping[str, Manifest]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int, int]]]:
    """Relative areas of all boxes and of those kept, and (class, all, kept) of the most frequent classes."""
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
