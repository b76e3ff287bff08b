"""ingest: photos and boxes of the source into Parquet parts, one per shard; every dropped row has a reason.

First the annotations and the list of photos are cut by shard in one streaming pass (parts `index`), here in the
driver. Then each shard is a unit: check its boxes, read or download its photos, write them down.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.annotations import box_files, class_names, read_annotations, with_names, without_lines
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.mask_files import (
    MaskFiles,
    mask_files,
    png_versions,
    segmentation_files,
    with_segmentations,
)
from pbe.data.boxfiles.openimages_masks import MASK_ROWS, mask_rows
from pbe.data.boxfiles.photo_names import BY_PATH, BY_SUFFIX, PhotoNames
from pbe.data.download import Downloader, PhotoError
from pbe.data.files import FileTree, SourceError, file_tree
from pbe.data.index import Selection, Selector, by_shard
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.pairs import PairsSource
from pbe.data.schema import (
    ANNOTATIONS,
    IMAGE_REASONS,
    INGEST_BOX_REASONS,
    PHOTOS,
    SPLITS,
    STATED,
    TRANSIENT_REASONS,
    with_optional,
    without_empty,
)
from pbe.data.settings import IngestConfig
from pbe.data.sources import FolderSource, OpenImagesSource, SampleSource, Source
from pbe.errors import one_line, printable
from pbe.places import local_path
from pbe.rejects import count_rejects
from pbe.store import UNITS_AT_ONCE, Manifest, Record, Store, digest, make_manifest, save_manifest
from pipelines.runtime.cures import cure_of_reject
from pipelines.runtime.parts import Unit, run_units
from pipelines.runtime.progress import progress_bar, with_progress
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 3

MENDED = {  # counts of boxes that were changed, in words
    "boxes_clipped": "ended outside their photo by less than rounding, and were clipped",
    "boxes_turned": "were turned with their photo: their file states the size of the other frame (ingest.exif)",
    "boxes_without_class_name": "have a category_id without a name, and keep it as their class",
}
# a photo without a usable box, a box without a usable photo: what happened to the other is the cause
CONSEQUENCES = ("image_without_box", "box_image_rejected")
# what a file is by itself, and stays; any other reason also follows from boxes, or from other files of its id
OWN_REASONS = ("image_unreadable", "image_too_large", "image_unpublished")


def main(stage: Stage) -> None:
    cfg = stage.params.ingest
    source = open_source(cfg)
    done, index = write_index(stage.store, source, cfg)
    everything = _takes_all(source, cfg)
    units = [Unit(record.unit.split("-")[0], _identity(cfg, record, everything), record) for record in index]
    with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
        units = list(pool.map(lambda unit: _latest(stage.store, unit, retry=cfg.retry_rejected), units))

    worker = partial(_worker, stage.store, source, cfg)
    records = run_units(stage, "ingest", units, worker=worker, each=cfg.per_shard, key="ingest")
    manifest = make_manifest("ingest", config=_content(cfg), version=VERSION, units=records)
    counts = Counter(manifest.counts)
    counts.update(done)
    assert counts["images_in"] == counts["images_kept"] + counts["images_rejected"]
    assert counts["boxes_in"] == counts["boxes_kept"] + counts["boxes_rejected"]
    save_counts(stage, counts)
    save_manifest(stage.outputs / "manifest.json", manifest)  # before the refusal: `pbe rejects` reads it
    _say_mended(counts)
    _say_extras(counts)
    _refuse_too_many_rejects(stage.store, manifest, counts, cfg.max_reject_frac)


def open_source(cfg: IngestConfig) -> Source:
    """The source that `ingest.source` names. Raises SourceError."""
    if cfg.source == "sample":
        return SampleSource(local_path(cfg.images))
    tree = file_tree(cfg.images, key="ingest.images")
    if cfg.source == "folder":
        return FolderSource(tree)
    if cfg.source == "pairs":
        return PairsSource(tree, file_tree(cfg.boxes, key="ingest.boxes"))
    return OpenImagesSource(tree, Downloader(cfg.image_base or "", cfg.download, max_bytes=cfg.max_image_bytes))


def write_index(store: Store, source: Source, cfg: IngestConfig) -> tuple[dict[str, int], list[Record]]:
    """Write an `index` unit per shard: annotations, photos, and `stated` where box files say more of photos.

    Returns counts of boxes, first those that are not selected, and the units.
    """
    tree = file_tree(cfg.boxes, key="ingest.boxes")
    classes = class_names(tree) if cfg.source != "pairs" else {}
    names = PhotoNames(pa.concat_tables(source.photos()) if source.lists_all else None)
    selector = Selector(_selection(cfg, names), _class_ids(cfg, classes))
    findings = Findings()
    if isinstance(source, PairsSource):
        annotated = source.annotations()
    else:
        annotated = _annotations(tree, names, findings, with_masks=cfg.masks == "read")
    segmented = segmentation_files(tree) if cfg.masks == "read" else []
    png_files = png_versions(tree) if segmented else {}
    records = []
    with (
        by_shard(_selected(annotated, tree, classes, selector), ANNOTATIONS, cfg.shards) as annotations,
        # after the annotations, because their names decide how photos that share a name are told apart
        by_shard([names.photos()] if source.lists_all else source.photos(), PHOTOS, cfg.shards) as photos,
        by_shard([findings.stated(names)], STATED, cfg.shards) as stated,
        # last, so that no name of a mask's photo rejects a box
        by_shard(_segmentations(tree, segmented, names, selector.class_ids), MASK_ROWS, cfg.shards) as masks,
    ):
        tables = zip(annotations, photos, stated, masks, strict=True)
        shards = with_progress(tables, "ingest: index", total=cfg.shards, unit="shard")
        for shard, (boxes, known, said, drawn) in enumerate(shards):
            boxes = with_segmentations(boxes, drawn, png_files) if segmented else boxes
            ids = boxes.column("image_id").combine_chunks()
            if not _takes_all(source, cfg):  # only what the selected boxes name is part of the input
                known = known.filter(pc.is_in(known.column("image_id"), ids))
            said = said.filter(pc.is_in(said.column("image_id"), ids))
            datasets = {"annotations": without_empty(boxes), "photos": known} | (
                {"stated": said} if said.num_rows else {}
            )
            records.append(store.write_unit_by_content("index", f"s{shard:04d}", datasets))
    _say_findings(names, findings)
    _say_missing(selector)
    return {"boxes_not_selected": selector.left_out} | dict(+findings.counts), records


def _say_findings(names: PhotoNames, findings: Findings) -> None:
    """Report how box files were read, where that is a decision that the user may want to check."""
    for remark in findings.remarks:
        print(f"ingest: {remark}")
    for how, count in sorted(names.counts().items()):
        if how not in (BY_PATH, BY_SUFFIX):
            print(f"ingest: {count} photos were found {how}")


def _say_mended(counts: Mapping[str, int]) -> None:
    for key, text in MENDED.items():
        if counts.get(key):
            print(f"ingest: {counts[key]} boxes {text}")


def _say_extras(counts: Mapping[str, int]) -> None:
    """Masks and pairs are an extra: rejected ones end nothing, and are said."""
    if found := counts.get("masks_in"):
        kept = counts.get("masks_kept", 0)
        print(f"ingest: {kept} of {counts['boxes_kept']} boxes have masks; {found - kept} masks rejected")
    if found := counts.get("pairs_in"):
        print(f"ingest: {counts.get('pairs_kept', 0)} of {found} pairs have their reference")


def _say_missing(selector: Selector) -> None:
    """Report the ids of `ingest.image_ids` without a box: they are not input rows, hence not rejects."""
    wanted = set(selector.selection.image_ids or ())
    missing = sorted(wanted - selector.found_ids)
    if missing:
        shown = printable(", ".join(missing[:3]))
        print(f"ingest: {len(missing)} of {len(wanted)} ids of ingest.image_ids have no box, such as {shown}")


def _takes_all(source: Source, cfg: IngestConfig) -> bool:
    """Return whether photos without a box are input too, and hence rejects: not if only some boxes are selected."""
    every_split = set(cfg.splits) == set(SPLITS)
    return source.lists_all and every_split and cfg.limit is None and cfg.classes is None and cfg.image_ids is None


def _annotations(tree: FileTree, names: PhotoNames, findings: Findings, *, with_masks: bool) -> Iterator[pa.Table]:
    """All boxes of all box files, in order; with_masks: with what is known of their masks."""
    # OpenImages' CSVs name their masks, which write_index joins shard by shard
    pictures = mask_files(tree, findings) if with_masks and not segmentation_files(tree) else MaskFiles()
    for file in box_files(tree, findings, required=not pictures):
        tables: Iterable[pa.Table] = (
            with_optional(table, ANNOTATIONS)
            for table in read_annotations(tree, file, names, findings, with_masks=with_masks)
        )
        if pictures and not file.name.lower().endswith(".json"):
            # masks count a photo's boxes in the file's order; rows with quoted commas, and odd ones, come last
            tables = [pa.concat_tables(tables).sort_by("line")]
        for table in tables:
            yield pictures.added_to(table) if pictures else table
    if pictures:
        yield pictures.left(SPLITS.index("train"))


def _segmentations(
    tree: FileTree, files: Iterable[str], names: PhotoNames, class_ids: Collection[str] | None
) -> Iterator[pa.Table]:
    """MASK_ROWS of the classes that are read."""
    for table in (table for file in files for table in mask_rows(tree, file, names)):
        if class_ids is not None:
            table = table.filter(pc.is_in(table.column("label"), pa.array(sorted(class_ids), pa.string())))
        yield table


def _selected(
    annotated: Iterator[pa.Table], tree: FileTree, classes: dict[str, str], selector: Selector
) -> Iterator[pa.Table]:
    rows = 0
    labels: set[str] = set()
    with progress_bar("ingest: boxes", total=None, unit="box") as bar:
        for table in annotated:
            rows += table.num_rows
            bar.update(table.num_rows)
            named = with_names(table, classes)
            if selector.class_ids is not None and not classes:  # COCO and CSVs without class descriptions
                labels.update(pc.unique(named.column("label")).to_pylist())
            yield without_lines(selector(named))
    unknown = sorted(set(selector.class_ids or ()) - labels) if not classes else []
    if unknown:
        known = ", ".join(sorted(labels)[:20])
        raise SourceError(f"ingest.classes: no box in {tree.where} is of class {', '.join(unknown)}; there are {known}")
    if rows == selector.left_out:
        raise SourceError(
            f"ingest.boxes: none of the {rows} boxes in {tree.where} matches ingest.splits, classes and image_ids"
        )


def _selection(cfg: IngestConfig, names: PhotoNames) -> Selection:
    ids = None
    if cfg.image_ids is not None:
        path = local_path(cfg.image_ids)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
            raise SourceError(f"ingest.image_ids: {path} cannot be read: {reason}") from None
        named = [line.strip().lstrip("/") for line in lines]  # also `train/<id>`, as the official downloader's
        ids = set(names.ids(pa.array(named, pa.string())).to_pylist()) - {""}
        if not ids:
            raise SourceError(f"ingest.image_ids: {path} holds no id")
    return Selection(splits=cfg.splits, limit=cfg.limit, classes=cfg.classes, image_ids=ids, val_frac=cfg.val_frac)


def _class_ids(cfg: IngestConfig, names: dict[str, str]) -> set[str] | None:
    """Labels of the wanted classes, which may be named by label or by name. Raises SourceError for one unknown."""
    if cfg.classes is None:
        return None
    by_name: dict[str, set[str]] = {}
    for label, name in names.items():
        by_name.setdefault(name.lower(), set()).add(label)
    out: set[str] = set()
    for wanted in cfg.classes:
        if names and wanted not in names and wanted.lower() not in by_name:
            raise SourceError(f"ingest.classes: '{wanted}' is neither a label nor a name of the class descriptions")
        out |= by_name.get(wanted.lower(), {wanted})
    return out


def _content(cfg: IngestConfig) -> dict[str, object]:
    """Return what the parts depend on besides their input.

    Download limits are left out, but not the address: rejects of a wrong image_base must not apply to the right one.
    """
    keys = {"source", "exif", "max_image_bytes", "max_image_pixels", "shards", "image_base"}
    keys |= {"masks"} if cfg.masks != "ignore" else set()
    return cfg.model_dump(mode="json", include=keys)


def _identity(cfg: IngestConfig, index: Record, everything: bool) -> str:
    return digest(["ingest", VERSION, _content(cfg), everything, [file.sha256 for file in index.files]])


# -- retries of transient failures -----------------------------------------------------------------------------------


def _latest(store: Store, unit: Unit, *, retry: bool) -> Unit:
    """Return the newest attempt of a shard, or, with `retry` and transient rejects in it, the next one to run.

    An attempt's digest includes the previous one's, so that names still identify content.
    """
    while True:
        record = store.find_unit("ingest", unit.name)
        if record is None or not any(record.counts.get(f"rejected_{reason}") for reason in TRANSIENT_REASONS):
            return unit
        identity = digest(["retry", unit.digest, [file.sha256 for file in record.files]])
        following = Unit(unit.label, identity, _Retry(_index_of(unit), record))
        if store.find_unit("ingest", following.name) is None and not retry:
            return unit
        unit = following


@dataclass(frozen=True)
class _Retry:
    """Payload of a retry: the index unit and the record of the previous attempt."""

    index: Record
    before: Record

    @property
    def chain(self) -> tuple[str, ...]:
        """Folders of all earlier attempts, oldest first."""
        return (*self.before.after, f"parts/ingest/{self.before.unit}")


def _index_of(unit: Unit) -> Record:
    return unit.payload.index if isinstance(unit.payload, _Retry) else unit.payload


def _reader(store: Store, source: Source, cfg: IngestConfig, unit: Unit) -> Callable[[str, str], bytes]:
    """Return a function from image id and address to bytes: the source, or in a retry what the last attempt settled."""

    def read(image_id: str, address: str) -> bytes:
        if address in gone:
            raise PhotoError(*gone[address])
        if image_id in have and address not in failed:
            return have[image_id]
        return source.read(address, cfg.max_image_bytes)

    have: dict[str, bytes] = {}
    gone: dict[str, tuple[str, str]] = {}
    failed: set[str] = set()
    if isinstance(unit.payload, _Retry):
        before = unit.payload.before
        for row in store.read_table(before.file("images"), columns=["image_id", "bytes"]).to_pylist():
            have[row["image_id"]] = row["bytes"]
        for row in store.read_table(before.file("rejects")).to_pylist():
            if row["reason"] in TRANSIENT_REASONS:
                failed.add(row["key"])
            elif row["reason"] in OWN_REASONS:
                gone[row["key"]] = (row["reason"], row["detail"])
    return read


# -- one shard ----------------------------------------------------------------------------------------------------


def _worker(store: Store, source: Source, cfg: IngestConfig) -> Callable[[Unit], Record]:
    reads = source.read_file if isinstance(source, PairsSource) else file_tree(cfg.boxes, key="ingest.boxes").read
    read_file = partial(reads, max_bytes=cfg.max_image_bytes)

    def work(unit: Unit) -> Record:
        index = _index_of(unit)
        stated = next((file for file in index.files if file.dataset == "stated"), None)
        tables, counts = read_shard(
            store.read_table(index.file("annotations")),
            store.read_table(index.file("photos")),
            read=_reader(store, source, cfg, unit),
            address_without_photo=source.address_without_photo,
            lists_all=_takes_all(source, cfg),
            limits=PhotoLimits(exif=cfg.exif, max_pixels=cfg.max_image_pixels),
            threads=cfg.download.connections,
            stated=store.read_table(stated) if stated else None,
            read_file=read_file,
        )
        after = unit.payload.chain if isinstance(unit.payload, _Retry) else ()
        return store.write_unit("ingest", unit.name, tables, counts=counts, after=after)

    return work


def _refuse_too_many_rejects(
    store: Store, manifest: Manifest, counts: Mapping[str, int], max_reject_frac: float
) -> None:
    for kind, reasons in (("images", IMAGE_REASONS), ("boxes", INGEST_BOX_REASONS)):
        total, rejected = counts[f"{kind}_in"], counts[f"{kind}_rejected"]
        none_kept = total > 0 and not counts[f"{kind}_kept"]
        if not none_kept and rejected <= max_reject_frac * total:
            continue
        found = _causes(counts, reasons)
        listed = ", ".join(f"{reason} {count}" for reason, count in found.items())
        cause = next(iter(found))
        advice = (
            f"First {_example(store, manifest, cause)}. To fix it, {cure_of_reject(cause)}; `pbe rejects` shows all"
        )
        if none_kept:
            raise StageError(f"ingest: none of {total} {kind} could be used ({listed}). {advice}")
        raise StageError(
            f"ingest: {rejected} of {total} {kind} rejected ({listed}), above ingest.max_reject_frac = "
            f"{max_reject_frac}. {advice}. Fix the input, or raise the limit; what was read stays in the storage"
        )


def _causes(counts: Mapping[str, int], reasons: Collection[str]) -> dict[str, int]:
    """Counts of the `reasons`, the most frequent first; where that one is a consequence, of all, consequences last."""
    found = {reason: counts.get(f"rejected_{reason}", 0) for reason in (*IMAGE_REASONS, *INGEST_BOX_REASONS)}
    most = max(reasons, key=lambda reason: found[reason])
    chosen = [reason for reason, count in found.items() if count and (reason in reasons or most in CONSEQUENCES)]
    if most in CONSEQUENCES:
        order = sorted(chosen, key=lambda reason: (reason in CONSEQUENCES, -found[reason]))
    else:
        order = sorted(chosen, key=lambda reason: -found[reason])
    return {reason: found[reason] for reason in order}


def _example(store: Store, manifest: Manifest, reason: str) -> str:
    """The first row that was rejected for `reason`."""
    rows = (row for entry in count_rejects(store, {"ingest": manifest}, examples=1) for row in entry.examples)
    row = next(row for row in rows if row["reason"] == reason)
    detail = one_line(row["detail"], 300)
    return detail if row["key"] in detail else f"{row['key']}: {detail}"
