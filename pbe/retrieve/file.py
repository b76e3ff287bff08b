"""The file of an index: neighbour graph with vectors, tables of photos and boxes, and a footer that describes them.

    graph          usearch's own format, so at the file's beginning, where usearch memory-maps it
    photos, boxes  Arrow IPC files, PHOTOS and ROWS, each beginning at a multiple of 64 bytes
    footer         JSON: meta, and offset, length and sha256 of each section
    end            sha256 of the footer, its length (8 bytes, little-endian), MAGIC with the format's version

Like Parquet, it is read from its end: what was cut off, or is another kind of file, lacks MAGIC there.

usearch 2.26 rather than faiss-cpu 1.15, because it is smaller and brings no second BLAS and OpenMP to stand beside
torch's: its wheel has 2.3 MB and numkong's 10.6 MB, faiss's 18.8 MB, 65 MB unpacked with OpenBLAS and libgomp.
Otherwise they are equal. 10,000 made vectors of 1,280 dimensions in float16, 16 links, two busy cores,
`tests/benchmarks/retrieval.py --vectors 10000 --compare`: recall@10 0.9985 and 0.9995, 0.37 and 0.27 ms per query, 437
and 479 vectors built per second, 2.75 (with all of the file) and 2.70 kB per vector. Both map their files. Licences:
Apache-2.0, MIT. int8 halves the file, but loses neighbours: recall@10 0.945, float16 0.999, of 20,000.

1.7 million vectors, as many as OpenImages has photos, made between those of neighbouring crops of 5,957 photos, and 200
crops of other photos (`--vectors 1700000 --photos ...`, two cores): built in 14 minutes, recall@10 0.9965 at 9.9 ms per
query with 2,048 nodes in sight, 0.9890 at 5.7 ms with 1,024, 0.9655 with 512; comparing all takes 305 ms.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from usearch.index import Index as Graph

from pbe.errors import UserError, one_line
from pbe.store import whole_file

MAGIC = b"PBEFIND1"  # the last digit is the format's version
ALIGN_BYTES = 64  # of Arrow's buffers
COPY_BYTES = 8 << 20
SMALL_BYTES = 256 << 20  # up to here opening a file compares all of it with its sha256, which takes a second at most
END_BYTES = 32 + 8 + len(MAGIC)
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 128, 2048  # of the graph: links per node, and nodes in sight

PHOTOS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source_url", pa.string()),
        pa.field("sha256", pa.string(), nullable=False),  # of the photo's bytes, which `crop_of` checks
        pa.field("exif_orientation", pa.int8(), nullable=False),
        # where the bytes are: a file's address in its source, or the row of meta's file number `part`
        pa.field("address", pa.string()),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)
# one row per vector, in the order of the graph's keys
ROWS = pa.schema(
    [
        pa.field("photo", pa.int32(), nullable=False),  # row of PHOTOS
        pa.field("box_index", pa.int32(), nullable=False),
        pa.field("label_name", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        *(pa.field(side, pa.float64(), nullable=False) for side in ("xmin", "xmax", "ymin", "ymax")),
    ]
)


class IndexFileError(UserError):
    """The file is no index, or is damaged."""


@dataclass(frozen=True)
class Contents:
    """An opened file; nothing of it is read before it is used. meta: see `build.index_meta`."""

    graph: Graph
    photos: pa.Table
    rows: pa.Table
    meta: Mapping[str, Any]


def new_graph(width: int) -> Graph:
    """An empty graph of vectors (width,), compared by cosine and kept as float16."""
    return Graph(
        ndim=width,
        metric="cos",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )


def write_index(path: Path, graph: Graph, photos: pa.Table, rows: pa.Table, meta: Mapping[str, Any]) -> None:
    """Write the file under another name and rename it. Raises IndexFileError if the disk refuses."""
    try:
        with whole_file(path) as beside:
            graph.save(str(beside))
            with beside.open("r+b") as stream:
                length = stream.seek(0, os.SEEK_END)
                sections = {"graph": (0, length, _sha256_of(stream, 0, length))}
                for name, table in (("photos", photos), ("rows", rows)):
                    start = stream.seek(0, os.SEEK_END)
                    start += stream.write(b"\0" * (-start % ALIGN_BYTES))
                    with pa.ipc.new_file(pa.PythonFile(stream, "w"), table.schema) as writer:
                        writer.write_table(table)
                    end = stream.seek(0, os.SEEK_END)
                    sections[name] = (start, end - start, _sha256_of(stream, start, end - start))
                footer = json.dumps({"meta": meta, "sections": sections, "count": len(graph)}, sort_keys=True).encode()
                stream.seek(0, os.SEEK_END)
                stream.write(footer + hashlib.sha256(footer).digest() + len(footer).to_bytes(8, "little") + MAGIC)
                stream.flush()
                os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        raise IndexFileError(f"{path}: cannot be written: {one_line(error, 300)}; its parts are kept") from None


def open_index(path: Path, *, verify: bool = False) -> Contents:
    """Memory-map the file. Raises IndexFileError for anything but a whole index.

    Lengths and footer are always checked, the sha256 of all sections where the file is small or `verify` is true.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size < END_BYTES:
                raise _broken(path, "it is too short")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise IndexFileError(f"{path}: not there; `pbe index --out {path}` makes it") from None
    except OSError as error:
        raise IndexFileError(f"{path}: cannot be opened: {one_line(error, 200)}") from None
    footer = _footer(path, data)
    with _broken_if_it_raises(path):
        sections = {
            name: (int(start), int(length), str(sha)) for name, (start, length, sha) in footer["sections"].items()
        }
        if size <= SMALL_BYTES or verify:
            for name, (start, length, sha256) in sections.items():
                if hashlib.sha256(memoryview(data)[start : start + length]).hexdigest() != sha256:
                    raise ValueError(f"its {name} differ from their sha256")
        tables = {name: _table(data, *sections[name][:2]) for name in ("photos", "rows")}
        graph = Graph.restore(str(path), view=True)
        if graph is None or len(graph) != footer["count"] or tables["rows"].num_rows != footer["count"]:
            raise ValueError("its graph and its rows do not match")
        graph.expansion_search = EXPANSION_SEARCH  # type: ignore[misc]  # it has a setter; the file does not keep it
        return Contents(graph, tables["photos"], tables["rows"], footer["meta"])


def _footer(path: Path, data: mmap.mmap) -> dict[str, Any]:
    if data[-len(MAGIC) :] != MAGIC:
        kind = data[-len(MAGIC) : -1] == MAGIC[:-1]
        raise _broken(path, "it has another version's format" if kind else "it does not end like one")
    length = int.from_bytes(data[-len(MAGIC) - 8 : -len(MAGIC)], "little")
    footer = data[max(0, len(data) - END_BYTES - length) : -END_BYTES]
    if len(footer) != length or hashlib.sha256(footer).digest() != data[-END_BYTES : -END_BYTES + 32]:
        raise _broken(path, "its footer differs from its sha256")
    return json.loads(footer)


def _table(data: mmap.mmap, start: int, length: int) -> pa.Table:
    return pa.ipc.open_file(pa.py_buffer(data).slice(start, length)).read_all()


def _sha256_of(stream: Any, start: int, length: int) -> str:
    out = hashlib.sha256()
    stream.seek(start)
    while length > 0:
        data = stream.read(min(COPY_BYTES, length))
        out.update(data)
        length -= len(data)
    return out.hexdigest()


@contextmanager
def _broken_if_it_raises(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
        raise _broken(path, one_line(error, 200)) from None


def _broken(path: Path, why: str) -> IndexFileError:
    return IndexFileError(f"{path}: not a whole index ({why}); `pbe index --out {path}` makes it again from its parts")
