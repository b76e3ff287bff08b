"""study: reports/study.html, on which people rank the edits of up to five methods, and the plan of who ranks what.

The paper's Table 2. The page is one file that sends nothing: raters open it, rank, and send back the file of answers
that it gives them. Methods have blind names there; data/study/plan.json alone has both. Edits are those of the first
kind of hole and the first noise seed, from the exemplar; a variant that reads words is shown with its first caption.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbe.config import Params
from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.schema import NO_SEED
from pbe.evaluate.settings import FilledBaseline
from pbe.store import File, Manifest, Store, load_manifest, write_json, write_whole
from pbe.study.page import Item, absurd_picture, encode_item, render
from pbe.study.plan import ABSURD, EXTRA_ITEMS, make_plan
from pbe.study.settings import METHODS_MAX
from pipelines.runtime.stage import Stage, StageError, output_folder

# raise it when another plan is drawn for the same settings and inputs
VERSION = 1
KEYS = ("bench_id", "hole_kind", "reference_kind", "seed")


@dataclass(frozen=True)
class Row:
    """Where an edit is: a row of one file."""

    file: File
    index: int


def main(stage: Stage) -> None:
    cfg = stage.params.study
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    edits = {name: _edits_of(stage, name, bench_file) for name in methods(stage.params)}
    found = {name: _rows(stage, name, manifest) for name, manifest in edits.items()}
    everywhere = [
        bench_id
        for bench_id in stage.store.read_table(bench_file, ["bench_id"])["bench_id"].to_pylist()
        if all(bench_id in rows for rows in found.values())
    ]
    digests = {name: manifest.digest for name, manifest in edits.items()}
    plan = make_plan(cfg, seed=stage.params.seed, bench=bench_file.sha256, edits=digests, bench_ids=everywhere)
    without = ""
    if not plan["raters"]:
        without = (
            f"There is nothing to rank: {', '.join(edits)} alone. Name a second method in variants or baselines."
            if len(edits) < 2
            else f"There is nothing to rank: {len(everywhere)} items have an edit by each of {', '.join(edits)}; "
            "a study needs 3, of which one is for practice and one for attention."
        )
    pictures = {} if without else _pictures(stage, bench_file, plan, found)
    html = render(plan, pictures, without=without)
    page = html.encode()
    size_mb = len(page) / 1e6
    if size_mb > cfg.max_page_mb:
        raise StageError(
            f"study: the page has {size_mb:.1f} MB, more than study.max_page_mb = {cfg.max_page_mb:g}; lower "
            f"study.picture_px = {cfg.picture_px} or study.items = {cfg.items}, or raise study.max_page_mb"
        )
    target = stage.root / "reports" / "study.html"
    write_json(stage.outputs / "plan.json", plan)
    write_whole(target, page)
    print(f"study: {without or _summary(plan, cfg.items)}")
    print(f"study: {target} ({size_mb:.1f} MB)")


def methods(params: Params) -> tuple[str, ...]:
    """Methods that are ranked: study.methods, or the first five variants and baselines. An open hole is no edit."""
    if params.study.methods is not None:
        return params.study.methods
    kept = [
        name
        for name, baseline in params.baselines.items()
        if not (isinstance(baseline, FilledBaseline) and baseline.kind == "hole_kept")
    ]
    return (*params.variants, *kept)[:METHODS_MAX]


def _edits_of(stage: Stage, name: str, bench_file: File) -> Manifest:
    path = output_folder(stage.root, "edit", name) / "manifest.json"
    again = f"run `dvc repro {'edit' if name in stage.params.variants else 'baseline'}@{name}` first"
    if not path.is_file():
        raise StageError(f"{path}: not there; {again}")
    manifest = load_manifest(path)
    if manifest.config["bench"] != bench_file.sha256:
        raise StageError(f"{path}: edits of another bench; {again}")
    return manifest


def _rows(stage: Stage, name: str, manifest: Manifest) -> dict[str, Row]:
    """The edit of each item: that of the first seed, or of a method without noise the only one."""
    edit, reference = stage.params.edit, "exemplar"
    if name in stage.params.variants and stage.params.train_variant(name).condition == "text":
        reference = edit.captions[0]
    out: dict[str, Row] = {}
    for file in manifest.files("edits"):
        for index, row in enumerate(stage.store.read_table(file, KEYS).to_pylist()):
            if (row["hole_kind"], row["reference_kind"]) == (edit.holes[0], reference):
                if row["seed"] == edit.seeds[0]:
                    out[row["bench_id"]] = Row(file, index)
                elif row["seed"] == NO_SEED:
                    out.setdefault(row["bench_id"], Row(file, index))
    return out


def _pictures(
    stage: Stage, bench_file: File, plan: Mapping[str, Any], found: Mapping[str, Mapping[str, Row]]
) -> dict[str, dict[str, str]]:
    """Pictures of the plan's items, as encode_item makes them: those of the attention item include the absurd one."""
    asked = [entry["item"] for entry in plan["items"]]
    place = {name: index for index, name in enumerate(stage.store.read_table(bench_file, ["bench_id"])[0].to_pylist())}
    rows = stage.store.read_table(bench_file).take([place[bench_id] for bench_id in asked]).to_pylist()
    edits = {
        blind: _read(stage.store, {bench_id: found[name][bench_id] for bench_id in asked})
        for blind, name in plan["methods"].items()
    }
    attention = {screen["item"] for rater in plan["raters"] for screen in rater["screens"] if ABSURD in screen["shown"]}
    out = {}
    for row in rows:
        bench_id, photo = row["bench_id"], images.decode(row["source"])
        filled = {blind: images.decode(pictures[bench_id]) for blind, pictures in edits.items()}
        if bench_id in attention:
            filled[ABSURD] = absurd_picture(*photo.shape[:2])
        hole_mask = hole_of(row, stage.params.edit.holes[0], photo)
        item = Item(photo, hole_mask, images.decode(row["exemplar"]), filled)
        out[bench_id] = encode_item(item, picture_px=stage.params.study.picture_px)
    return out


def _read(store: Store, rows: Mapping[str, Row]) -> dict[str, bytes]:
    """The encoded edits in these rows, by item; each file is read once."""
    out: dict[str, bytes] = {}
    for file in {row.file.path: row.file for row in rows.values()}.values():
        here = {bench_id: row.index for bench_id, row in rows.items() if row.file == file}
        table = store.read_table(file, ["edit"]).take(list(here.values()))
        out |= dict(zip(here, table["edit"].to_pylist(), strict=True))
    return out


def _summary(plan: Mapping[str, Any], asked: int) -> str:
    items, screens = len(plan["items"]) - EXTRA_ITEMS, len(plan["raters"][0]["screens"])
    fewer = f" (of study.items = {asked}; the bench has no more)" if items < asked else ""
    return (
        f"{len(plan['raters'])} raters, {items} items{fewer}, {screens} screens each, methods "
        f"{', '.join(plan['edits'])}; plan {plan['digest']}"
    )
