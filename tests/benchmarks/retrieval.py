"""How well and how fast does an index of N vectors find the nearest ten, against comparing all?

    python tests/benchmarks/retrieval.py [--vectors 10000] [--photos DIR ...] [--threads 2] [--compare] [--device cuda]

Makes vectors of 1,280 dimensions, as efficientnet_lite0's; then builds and writes an index file as `pbe index` does,
opens it and asks 200 other vectors. With --photos the vectors lie between those of neighbouring crops of these photos,
and those of other photos ask: of 24,000, a graph with 128 nodes in sight finds 0.998 of the neighbours, as of 24,000
vectors of real crops (0.9985). Without: N / 200 clusters in random directions, which vary along 48 common ones; photos
do not, and of 1.7 million the graph's descent rarely meets the right one of 8,500 clusters (recall@10 0.16). Prints
vectors built per second, bytes per vector, recall@10 against an exact search, and the medians of both searches'
milliseconds. N = 1,700,000 is OpenImages; it takes 5.5 GB of memory. --compare also builds faiss's HNSW graph and
inverted lists, if faiss-cpu is installed. Both sides run on the processor: --device cuda changes nothing, and says so.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pbe.data import images
from pbe.model.backbone import load_backbone
from pbe.retrieve.embed import embed
from pbe.retrieve.file import EXPANSION_SEARCH, PHOTOS, ROWS, new_graph, open_index, write_index
from tests.benchmarks.device import add_device, say_processor_alone

QUERIES, K, DIRECTIONS, NEIGHBOURS, BLOCK = 200, 10, 48, 10, 10_000


class Made:
    """Made unit vectors, the same for each number of a block."""

    def __init__(self, count: int, width: int) -> None:
        rng = np.random.default_rng(0)
        self.width = width
        self.centres = rng.standard_normal((max(16, count // 200), width), np.float32)
        self.directions = rng.standard_normal((DIRECTIONS, width), np.float32)

    def block(self, rows: int, number: int) -> np.ndarray:
        """(rows, width) float32."""
        rng = np.random.default_rng((1, number))
        out: np.ndarray = self.centres[rng.integers(0, len(self.centres), rows)]
        out = out + 0.12 * rng.standard_normal((rows, DIRECTIONS), np.float32) @ self.directions
        out += 0.1 * rng.standard_normal((rows, self.width), np.float32)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def queries(self) -> np.ndarray:
        return self.block(QUERIES, -1 % 2**32)

    def blocks(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, count, BLOCK):
            yield start, self.block(min(BLOCK, count - start), start)


class Between(Made):
    """Vectors between those of crops that are each other's neighbours: a third each of one, a neighbour and its."""

    def __init__(self, photos: Sequence[Path]) -> None:
        backbone, rng = load_backbone("efficientnet_lite0"), np.random.default_rng(0)
        files = sorted(path for folder in photos for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
        files = [files[number] for number in rng.permutation(len(files))]
        crops = (random_crop(images.open_picture(path).upright(), rng, backbone.input_px) for path in files)
        found = []
        while batch := list(islice(crops, 32)):
            found.append(embed(batch, ["a crop"] * len(batch), backbone, torch.device("cpu")))
        vectors = np.concatenate(found)
        self.width = vectors.shape[1]
        self._queries, self._pool = vectors[:QUERIES], vectors[QUERIES:]
        self._near = np.argpartition(-(self._pool @ self._pool.T), NEIGHBOURS + 1, 1)[:, : NEIGHBOURS + 1]
        print(f"between the vectors of {len(self._pool)} photos", flush=True)

    def queries(self) -> np.ndarray:
        return self._queries

    def block(self, rows: int, number: int) -> np.ndarray:
        rng = np.random.default_rng((1, number))
        corners = [rng.integers(0, len(self._pool), rows)]
        for _ in range(2):
            corners.append(self._near[corners[-1], rng.integers(0, self._near.shape[1], rows)])
        shares = rng.dirichlet((1, 1, 1), rows).astype(np.float32)
        out: np.ndarray = sum(shares[:, [n]] * self._pool[corner] for n, corner in enumerate(corners))
        return out / np.linalg.norm(out, axis=1, keepdims=True)


def random_crop(photo: np.ndarray, rng: np.random.Generator, side_px: int) -> np.ndarray:
    """A square whose side is 0.3 to 1 of the photo's shorter one."""
    side = int(min(photo.shape[:2]) * rng.uniform(0.3, 1))
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    return images.resize(photo[y : y + side, x : x + side], width_px=side_px, height_px=side_px)


def exact(made: Made, count: int, queries: np.ndarray) -> np.ndarray:
    """(Q, K) rows of the nearest, in float32."""
    best = np.full((len(queries), K), -2.0, np.float32)
    rows = np.zeros((len(queries), K), np.int64)
    for start, block in made.blocks(count):
        near = np.concatenate([best, queries @ block.T], 1)
        names = np.concatenate(
            [rows, np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))], 1
        )
        top = np.argpartition(-near, K, axis=1)[:, :K]
        best, rows = np.take_along_axis(near, top, 1), np.take_along_axis(names, top, 1)
    return rows


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def timed(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[np.ndarray, float]:
    """Results, and the median milliseconds of a query by itself."""
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query[None])[0])
        times.append(1e3 * (time.perf_counter() - start))
    return np.stack(found), float(np.median(times))


def compare_with_faiss(made: Made, count: int, threads: int, queries: np.ndarray, truth: np.ndarray) -> None:
    try:
        import faiss
    except ImportError:
        print("faiss: not installed, so not compared")
        return
    faiss.omp_set_num_threads(threads)
    lists = max(16, int(4 * count**0.5))
    sample = made.block(min(count, 40 * lists), 0)
    for recipe, setting in (("HNSW16,SQfp16", f"efSearch={EXPANSION_SEARCH}"), (f"IVF{lists},SQfp16", "nprobe=32")):
        index = faiss.index_factory(made.width, recipe, faiss.METRIC_INNER_PRODUCT)
        start = time.perf_counter()
        index.train(sample)
        for _, block in made.blocks(count):
            index.add(block)
        seconds = time.perf_counter() - start
        faiss.ParameterSpace().set_index_parameters(index, setting)
        faiss.omp_set_num_threads(1)
        found, ms = timed(lambda query, index=index: index.search(query, K)[1], queries)  # type: ignore[misc]
        faiss.omp_set_num_threads(threads)
        size = len(faiss.serialize_index(index))
        print(f"faiss {recipe} {setting}: {count / seconds:.0f} vectors/s, {size / count:.0f} bytes each, "
              f"recall@{K} {recall(found, truth):.4f}, {ms:.2f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photos", type=Path, nargs="+", help="folders of some thousand photos")
    parser.add_argument("--compare", action="store_true")
    add_device(parser)
    args = parser.parse_args()
    say_processor_alone(args.device, "usearch does all of it")
    made, count = Between(args.photos) if args.photos else Made(args.vectors, args.width), args.vectors
    queries = made.queries()

    graph, seconds, busy = new_graph(made.width), 0.0, 0.0
    for start, block in made.blocks(count):
        begun, processor = time.perf_counter(), time.process_time()
        graph.add(np.arange(start, start + len(block)), block, threads=args.threads)
        seconds, busy = seconds + time.perf_counter() - begun, busy + time.process_time() - processor
        if start % (10 * BLOCK) == 0 and start:
            print(f"{start} vectors after {seconds:.0f} s", file=sys.stderr, flush=True)
    print(
        f"{count} vectors of {made.width}, {args.threads} threads: built {count / seconds:.0f} vectors/s, "
        f"{count / busy:.0f} per second of processor time",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.index"
        rows = pa.table({name: np.zeros(count) for name in ROWS.names if name != "label_name"})
        names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["made"]))
        rows = rows.add_column(2, "label_name", names).cast(ROWS)
        write_index(path, graph, PHOTOS.empty_table(), rows, {})
        del graph
        begun = time.perf_counter()
        contents = open_index(path)
        opened = time.perf_counter() - begun
        truth = exact(made, count, queries)
        print(f"file of {path.stat().st_size / count:.0f} bytes per vector, opened in {opened:.2f} s")
        vectors = made.block(min(count, BLOCK), 0)
        _, part_ms = timed(lambda query: query @ vectors.T, queries[:20])
        print(f"comparing all takes {part_ms * count / len(vectors):.1f} ms per query")
        for expansion in (EXPANSION_SEARCH // 4, EXPANSION_SEARCH // 2, EXPANSION_SEARCH):
            contents.graph.expansion_search = expansion  # type: ignore[misc]  # it has a setter
            found, ms = timed(lambda query: contents.graph.search(query[0], K, threads=1).keys[None], queries)
            print(
                f"{expansion} nodes in sight: recall@{K} {recall(found, truth):.4f} at {ms:.2f} ms per query",
                flush=True,
            )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    if args.compare:
        compare_with_faiss(made, count, args.threads, queries, truth)


if __name__ == "__main__":
    main()
