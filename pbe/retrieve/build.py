"""Build an index, part by part: each shard's vectors are a unit of the storage, named by what they are made from.

A killed build, or a data set that has grown, embeds only what is missing. The parts are needed only until the file is
written: no manifest names them, and `pbe gc` removes those that are a day old; a later build makes them again.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from pbe.data import images
from pbe.data.annotations import box_files, class_names, read_annotations, with_names, without_lines
from pbe.data.boxfiles.findings import Findings
from pbe.data.boxfiles.photo_names import PhotoNames
from pbe.data.files import SourceError, file_tree
from pbe.data.index import by_shard
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.schema import ANNOTATIONS, ENDS, STATED, with_optional, without_empty
from pbe.data.schema import PHOTOS as LISTED
from pbe.data.settings import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from pbe.data.sources import FolderSource
from pbe.data.triplets import cut
from pbe.errors import UserError, printable
from pbe.model.backbone import Backbone
from pbe.retrieve.embed import area_of, backbone_key, embed
from pbe.retrieve.file import PHOTOS, ROWS, new_graph, write_index
from pbe.retrieve.photos import FolderPhotos, Photos, RunPhotos
from pbe.store import File, Manifest, Record, Store, digest

# names the parts, in place of the code: raise it when their bytes change for the same inputs
VERSION = 1
KIND = "embeddings"  # the parts' folder below parts/, which pbe/gc.py knows
BATCH_ROWS = 32  # crops per call of the backbone
PHOTOS_AHEAD = 8  # decoded while the backbone runs
DECODE_THREADS = 2
FOLDER_SHARDS = 64  # fixed, so that a folder that grows changes only the shards of its new photos
PHOTOS_AT_ONCE = 64  # of a folder, whose bytes are held

# the rows of a part: ROWS, with the vector
EMBEDDED = pa.schema(
    [
        pa.field("photo", pa.int32(), nullable=False),  # row of the part's photos
        pa.field("box_index", pa.int32(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        *(pa.field(side, pa.float64(), nullable=False) for side in ENDS),
        # little-endian float16
        pa.field("vector", pa.binary(), nullable=False, metadata={b"compression": b"none"}),
    ]
)


class BuildError(UserError, ValueError):
    """There is nothing to index."""


@dataclass(frozen=True)
class Embedder:
    """A backbone, and how crops are cut for it. model: its folder, which the index remembers."""

    backbone: Backbone
    pad_px: int
    device: torch.device
    model: str

    @property
    def identity(self) -> list[Any]:
        return [VERSION, backbone_key(self.backbone), self.pad_px]


@dataclass(frozen=True)
class Built:
    """What was built: boxes and photos in the file, and the parts that were made rather than found."""

    boxes: int
    photos: int
    parts: int
    parts_made: int


@dataclass(frozen=True)
class _Shard:
    """One part's work. tables: yields photos with bytes and the boxes of these, a few photos at a time."""

    label: str
    identity: str
    rows: int
    tables: Iterable[tuple[pa.Table, pa.Table]]
    part: int


def build_from_run(
    out: Path, store: Store, ingested: Manifest, filtered: Manifest, embedder: Embedder, *, bar: bool = False
) -> Built:
    """Index the boxes that the filter kept, of all splits. Raises UserError."""
    files = ingested.files("images")
    shards = []
    for part, (images_unit, boxes_unit) in enumerate(zip(ingested.units, filtered.units, strict=True)):
        photos, boxes = images_unit.file("images"), boxes_unit.file("boxes")
        identity = digest([*embedder.identity, "run", part, photos.sha256, boxes.sha256])
        label = images_unit.unit.split("-")[0]
        shards.append(_Shard(label, identity, boxes.rows, _RunTables(store, photos, boxes), part))
    return _build(out, store, shards, RunPhotos(store, files), embedder, bar=bar)


def build_from_folder(
    out: Path, store: Store, photos: str, boxes: str, embedder: Embedder, *, bar: bool = False
) -> Built:
    """Index all boxes of box files (ingest's formats) of the photos in a folder; both local and absolute, or s3://.

    Boxes are taken to refer to upright pictures, as viewers show them. Raises UserError.
    """
    shards = list(_folder_shards(store, photos, boxes, embedder))
    return _build(out, store, shards, FolderPhotos(photos), embedder, bar=bar)


def _build(
    out: Path, store: Store, shards: Sequence[_Shard], photos: Photos, embedder: Embedder, *, bar: bool
) -> Built:
    if not sum(shard.rows for shard in shards):
        raise BuildError("nothing to index: no box is left of this data; `pbe rejects` says what was dropped")
    records, made = [], 0
    with tqdm(total=sum(shard.rows for shard in shards), unit="box", disable=not bar) as progress:
        for shard in shards:
            if not shard.rows:
                continue
            unit = f"{shard.label}-{shard.identity}"
            record = store.find_unit(KIND, unit)
            if record is None:
                record, made = _embedded(store, unit, shard, embedder, progress), made + 1
            else:
                progress.update(shard.rows)
            records.append(record)
    return _write(out, store, records, made, photos, embedder)


def _embedded(store: Store, unit: str, shard: _Shard, embedder: Embedder, progress: tqdm) -> Record:
    """Cut and embed a shard's boxes, photos being decoded in threads meanwhile, and write the part."""
    photos: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    waiting: list[tuple[np.ndarray, str]] = []

    def flush() -> None:
        if waiting:
            squares, names = zip(*waiting, strict=True)
            vectors.extend(embed(squares, names, embedder.backbone, embedder.device).astype("<f2"))
            waiting.clear()

    with ThreadPoolExecutor(DECODE_THREADS) as pool, closing(_cut_ahead(pool, shard, embedder)) as cut_photos:
        for photo, boxes, squares in cut_photos:
            photos.append(photo)
            for box, square in zip(boxes, squares, strict=True):
                rows.append({name: box[name] for name in EMBEDDED.names if name in box} | {"photo": len(photos) - 1})
                waiting.append((square, f"photo {photo['image_id']}, box {box['box_index']}"))
                if len(waiting) == BATCH_ROWS:
                    flush()
            progress.update(len(boxes))
    flush()
    done = [row | {"vector": vector.tobytes()} for row, vector in zip(rows, vectors, strict=True)]
    tables = {
        "photos": pa.Table.from_pylist(photos, schema=PHOTOS),
        "rows": pa.Table.from_pylist(done, schema=EMBEDDED),
    }
    return store.write_unit(KIND, unit, tables, counts={"photos": len(photos), "boxes": len(rows)})


_Cut = tuple[dict[str, Any], list[dict[str, Any]], list[np.ndarray]]


def _cut_ahead(pool: ThreadPoolExecutor, shard: _Shard, embedder: Embedder) -> Generator[_Cut, None, None]:
    """Yield each photo's row of PHOTOS, its boxes and their squares; at most PHOTOS_AHEAD photos are held."""
    ahead: deque[Future[_Cut]] = deque()
    try:
        row = 0
        for photos, boxes in shard.tables:
            boxes_of: dict[str, list[dict[str, Any]]] = {}
            for box in boxes.select(["image_id", "box_index", "label_name", *ENDS]).to_pylist():
                boxes_of.setdefault(box["image_id"], []).append(box)
            for number, photo in enumerate(photos.drop_columns(["bytes"]).to_pylist()):
                if photo["image_id"] in boxes_of:
                    place = {"address": photo.get("address"), "part": shard.part, "row": row + number}
                    known = {name: photo[name] for name in PHOTOS.names if name in photo} | place
                    data = photos.column("bytes")[number].as_buffer()
                    ahead.append(pool.submit(_cut_photo, data, known, boxes_of[photo["image_id"]], embedder))
                if len(ahead) >= PHOTOS_AHEAD:
                    yield ahead.popleft().result()
            row += photos.num_rows
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _cut_photo(data: pa.Buffer, photo: dict[str, Any], boxes: list[dict[str, Any]], embedder: Embedder) -> _Cut:
    picture = images.decode(memoryview(data), exif_orientation=photo["exif_orientation"])
    side = embedder.backbone.input_px
    return photo, boxes, [cut(picture, area_of(box, picture, embedder.pad_px), side) for box in boxes]


def _write(out: Path, store: Store, records: Sequence[Record], made: int, photos: Photos, embedder: Embedder) -> Built:
    """Join the parts into the file. Memory: the graph with its vectors, the tables, and one part.

    The graph is built with all cores, so that its links, not its rows, vary from build to build.
    """
    graph = new_graph(embedder.backbone.width)
    photo_tables, row_tables, first_photo = [], [], 0
    for record in records:
        rows = store.read_table(record.file("rows"))
        count = rows.num_rows
        joined = np.frombuffer(b"".join(rows.column("vector").to_pylist()), "<f2").reshape(count, graph.ndim)
        if count:  # usearch takes no empty array; photos that do not decode leave an empty part
            graph.add(np.arange(len(graph), len(graph) + count, dtype=np.uint64), joined.astype(np.float32))
        numbers = pc.add(rows.column("photo"), pa.scalar(first_photo, pa.int32()))
        row_tables.append(rows.drop_columns(["vector"]).set_column(0, "photo", numbers))
        photo_tables.append(store.read_table(record.file("photos")))
        first_photo += photo_tables[-1].num_rows
    if not len(graph):
        raise BuildError("nothing to index: no box is left of this data, because none of its photos could be used")
    all_photos = pa.concat_tables(photo_tables).cast(PHOTOS).combine_chunks()
    all_rows = pa.concat_tables(row_tables).combine_chunks()
    labels = all_rows.column("label_name").combine_chunks().dictionary_encode()
    all_rows = all_rows.set_column(2, "label_name", labels).cast(ROWS)
    meta = {
        "backbone": backbone_key(embedder.backbone),
        "model": embedder.model,
        "pad_px": embedder.pad_px,
        "photos": photos.meta(),
    }
    write_index(out, graph, all_photos, all_rows, meta)
    return Built(len(graph), all_photos.num_rows, len(records), made)


# -- a run's data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RunTables:
    """Photos of one of ingest's parts by row group, each with the kept boxes of its part."""

    store: Store
    photos: File
    boxes: File

    def __iter__(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        boxes = self.store.read_table(self.boxes, columns=["image_id", "box_index", "label_name", *ENDS])
        footer = self.store.read_footer(self.photos)
        parquet = self.store.open_parquet(self.photos, footer)
        groups = parquet.num_row_groups
        parquet.close(force=True)
        for group in range(groups):
            table = self.store.read_row_group(self.photos, group, footer)
            yield table, boxes.filter(pc.is_in(boxes.column("image_id"), table.column("image_id").combine_chunks()))


# -- a folder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FolderTables:
    """Photos of one shard of a folder, checked as ingest does; what it drops is printed."""

    source: FolderSource
    annotations: pa.Table
    listed: pa.Table
    stated: pa.Table

    def __iter__(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        ids = sorted(set(self.listed.column("image_id").to_pylist()))
        for start in range(0, len(ids), PHOTOS_AT_ONCE):
            some = pa.array(ids[start : start + PHOTOS_AT_ONCE], pa.string())
            addresses: dict[str, str] = {}

            def read(image_id: str, address: str, addresses: dict[str, str] = addresses) -> bytes:
                data = self.source.read(address, MAX_IMAGE_BYTES)
                addresses.setdefault(image_id, address)
                return data

            tables, _ = read_shard(
                *(table.filter(pc.is_in(table.column("image_id"), some)) for table in (self.annotations, self.listed)),
                read=read,
                address_without_photo=self.source.address_without_photo,
                lists_all=False,
                limits=PhotoLimits(exif="apply", max_pixels=MAX_IMAGE_PIXELS),
                threads=DECODE_THREADS,
                stated=self.stated,
            )
            for reject in tables["rejects"].to_pylist():
                tqdm.write(printable(f"left out: {reject['key']}: {reject['reason']}: {reject['detail']}"))
            photos = tables["images"]
            found = [addresses[image_id] for image_id in photos.column("image_id").to_pylist()]
            yield photos.append_column("address", pa.array(found, pa.string())), tables["boxes"]


def _folder_shards(store: Store, photos: str, boxes: str, embedder: Embedder) -> Iterator[_Shard]:
    source, tree = FolderSource(file_tree(photos, key="--photos")), file_tree(boxes, key="--boxes")
    names, findings = PhotoNames(pa.concat_tables(source.photos())), Findings()
    classes = class_names(tree)

    def annotations() -> Iterator[pa.Table]:
        for file in box_files(tree, findings):
            for table in read_annotations(tree, file, names, findings):
                yield without_lines(with_names(with_optional(table, ANNOTATIONS), classes))

    missing = 0
    with (
        by_shard(annotations(), ANNOTATIONS, FOLDER_SHARDS) as annotated,
        by_shard([names.photos()], LISTED, FOLDER_SHARDS) as listed,  # after the boxes, which decide on shared names
        by_shard([findings.stated(names)], STATED, FOLDER_SHARDS) as said,
    ):
        for number, (rows, known, sizes) in enumerate(zip(annotated, listed, said, strict=True)):
            ids = rows.column("image_id").combine_chunks()
            known = known.filter(pc.is_in(known.column("image_id"), ids))
            there = rows.filter(pc.is_in(ids, known.column("image_id").combine_chunks()))
            missing += rows.num_rows - there.num_rows
            sizes = sizes.filter(pc.is_in(sizes.column("image_id"), ids))
            datasets = {"annotations": without_empty(there), "photos": known, "stated": sizes}
            label = f"f{number:02d}"
            inputs = store.write_unit_by_content("index", label, datasets)
            identity = digest([*embedder.identity, "folder", inputs.unit])
            yield _Shard(label, identity, there.num_rows, _FolderTables(source, there, known, sizes), -1)
    for remark in findings.remarks:
        print(printable(remark))
    if missing:
        print(f"left out: {missing} boxes whose photos are not in {printable(photos)}")


def absolute(location: str) -> str:
    """A local folder's or file's absolute path, because an index outlives the working directory; s3:// as it is."""
    if location.startswith("s3://"):
        return location
    path = Path(location).expanduser().resolve()
    if not path.exists():
        raise SourceError(f"{location}: not there")
    return str(path)
