"""ingest: photos and boxes of the source into Parquet parts, one per shard; every dropped row has a reason.

First the annotations and the list of photos are cut by shard in one streaming pass (parts `index`), here in the
driver. Then each shard is a unit: check its boxes, read or download its photos, write them down.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.annotations import box_files, class_names, clean_ids, read_annotations, with_names, without_lines
from pbe.data.download import Downloader, PhotoError
from pbe.data.files import FileTree, SourceError, file_tree
from pbe.data.index import Selection, Selector, by_shard
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.schema import ANNOTATIONS, IMAGE_REASONS, INGEST_BOX_REASONS, PHOTOS, SPLITS, TRANSIENT_REASONS
from pbe.data.settings import IngestConfig
from pbe.data.sources import FolderSource, OpenImagesSource, SampleSource, Source
from pbe.errors import printable
from pbe.places import local_path
from pbe.store import Record, Store, digest, make_manifest, save_manifest
from pipelines.runtime.parts import Unit, run_units
from pipelines.runtime.progress import progress_bar, with_progress
from pipelines.runtime.stage import Stage, StageError, save_counts

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2


def main(stage: Stage) -> None:
    cfg = stage.params.ingest
    source = open_source(cfg)
    left_out, index = write_index(stage.store, source, cfg)
    everything = _takes_all(source, cfg)
    units = [Unit(record.unit.split("-")[0], _identity(cfg, record, everything), record) for record in index]
    units = [_latest(stage.store, unit, retry=cfg.retry_rejected) for unit in units]

    worker = partial(_worker, stage.store, source, cfg)
    records = run_units(stage, "ingest", units, worker=worker, each=cfg.per_shard, key="ingest")
    manifest = make_manifest("ingest", config=_content(cfg), version=VERSION, units=records)
    counts = {**manifest.counts, "boxes_not_selected": left_out}
    assert counts["images_in"] == counts["images_kept"] + counts["images_rejected"]
    assert counts["boxes_in"] == counts["boxes_kept"] + counts["boxes_rejected"]
    save_counts(stage, counts)
    save_manifest(stage.outputs / "manifest.json", manifest)  # before the refusal: `pbe rejects` reads it
    _refuse_too_many_rejects(counts, cfg.max_reject_frac)


def open_source(cfg: IngestConfig) -> Source:
    """The source that `ingest.source` names. Raises SourceError."""
    if cfg.source == "sample":
        return SampleSource(local_path(cfg.images))
    tree = file_tree(cfg.images, key="ingest.images")
    if cfg.source == "folder":
        return FolderSource(tree)
    return OpenImagesSource(tree, Downloader(cfg.image_base or "", cfg.download, max_bytes=cfg.max_image_bytes))


def write_index(store: Store, source: Source, cfg: IngestConfig) -> tuple[int, list[Record]]:
    """Write an `index` unit per shard (annotations and photos); also return the number of unselected annotations."""
    tree = file_tree(cfg.boxes, key="ingest.boxes")
    names = class_names(tree)
    selector = Selector(_selection(cfg), _class_ids(cfg, names))
    records = []
    with (
        by_shard(_selected(tree, names, selector), ANNOTATIONS, cfg.shards) as annotations,
        by_shard(source.photos(), PHOTOS, cfg.shards) as photos,
    ):
        pairs = with_progress(zip(annotations, photos, strict=True), "ingest: index", total=cfg.shards, unit="shard")
        for shard, (boxes, known) in enumerate(pairs):
            if not _takes_all(source, cfg):  # only what the selected boxes name is part of the input
                known = known.filter(pc.is_in(known.column("image_id"), boxes.column("image_id").combine_chunks()))
            records.append(
                store.write_unit_by_content("index", f"s{shard:04d}", {"annotations": boxes, "photos": known})
            )
    _say_missing(selector)
    return selector.left_out, records


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


def _selected(tree: FileTree, names: dict[str, str], selector: Selector) -> Iterator[pa.Table]:
    rows = 0
    labels: set[str] = set()
    with progress_bar("ingest: boxes", total=None, unit="box") as bar:
        for file in box_files(tree):
            for table in read_annotations(tree, file):
                rows += table.num_rows
                bar.update(table.num_rows)
                named = with_names(table, names)
                if selector.class_ids is not None and not names:  # COCO and CSVs without class descriptions
                    labels.update(pc.unique(named.column("label")).to_pylist())
                yield without_lines(selector(named))
    unknown = sorted(set(selector.class_ids or ()) - labels) if not names else []
    if unknown:
        known = ", ".join(sorted(labels)[:20])
        raise SourceError(f"ingest.classes: no box in {tree.where} is of class {', '.join(unknown)}; there are {known}")
    if rows == selector.left_out:
        raise SourceError(
            f"ingest.boxes: none of the {rows} boxes in {tree.where} is of ingest.splits, classes and image_ids"
        )


def _selection(cfg: IngestConfig) -> Selection:
    ids = None
    if cfg.image_ids is not None:
        path = local_path(cfg.image_ids)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
            raise SourceError(f"ingest.image_ids: {path} cannot be read: {reason}") from None
        named = [line.strip().rpartition("/")[2] for line in lines]  # also `train/<id>`, as the official downloader's
        ids = set(clean_ids(pa.array(named, pa.string())).to_pylist()) - {""}
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
            else:
                gone[row["key"]] = (row["reason"], row["detail"])
    return read


# -- one shard ----------------------------------------------------------------------------------------------------


def _worker(store: Store, source: Source, cfg: IngestConfig) -> Callable[[Unit], Record]:
    def work(unit: Unit) -> Record:
        index = _index_of(unit)
        tables, counts = read_shard(
            store.read_table(index.file("annotations")),
            store.read_table(index.file("photos")),
            read=_reader(store, source, cfg, unit),
            address_without_photo=source.address_without_photo,
            lists_all=_takes_all(source, cfg),
            limits=PhotoLimits(exif=cfg.exif, max_pixels=cfg.max_image_pixels),
            threads=cfg.download.connections,
        )
        after = unit.payload.chain if isinstance(unit.payload, _Retry) else ()
        return store.write_unit("ingest", unit.name, tables, counts=counts, after=after)

    return work


def _refuse_too_many_rejects(counts: dict[str, int], max_reject_frac: float) -> None:
    for kind, known in (("images", IMAGE_REASONS), ("boxes", INGEST_BOX_REASONS)):
        total, rejected = counts[f"{kind}_in"], counts[f"{kind}_rejected"]
        found = {reason: counts.get(f"rejected_{reason}", 0) for reason in known}
        reasons = ", ".join(f"{reason} {count}" for reason, count in found.items() if count)
        if counts[f"{kind}_kept"] == 0:
            raise StageError(f"ingest: none of {total} {kind} could be used ({reasons}); see `pbe rejects`")
        if rejected > max_reject_frac * total:
            raise StageError(
                f"ingest: {rejected} of {total} {kind} rejected ({reasons}), above ingest.max_reject_frac = "
                f"{max_reject_frac}. `pbe rejects` shows them; fix the input, set ingest.retry_rejected for failed "
                "downloads and files that were gone, or raise the limit. What was read stays in the storage"
            )
