"""Index, the public entry to retrieval.

index = Index.open(Path("exemplars.index"))
hits = index.find(like=crop, backbone=index.backbone(), k=12)
exemplar = index.crop_of(hits[0])
"""

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.model.backbone import Backbone
from pbe.model.weights import load_exemplar_backbone
from pbe.places import storage_uri
from pbe.retrieve.embed import FindError, area_of, backbone_key, default_device, embed, squashed
from pbe.retrieve.file import Contents, open_index
from pbe.retrieve.photos import Photos, photos_of, read_photo
from pbe.retrieve.text import text_query
from pbe.store import Store

EXACT_ROWS = 20_000  # up to so many vectors are all compared, which takes less than 0.1 s
SCAN_ROWS = 16_384  # vectors held at once in float32, 84 MB at 1,280 dimensions
TEXT_CANDIDATES = 2_000  # that are compared by their projections
OVERSAMPLING = 4  # hits asked for each that is wanted, because several may be of one photo


@dataclass(frozen=True)
class Hit:
    """One box. box: x0, y0, x1, y1 in fractions of its photo. distance: 1 - cosine, 0 = alike. row: in the index."""

    image_id: str
    box_index: int
    box: tuple[float, float, float, float]
    label_name: str
    distance: float
    license: str | None
    author: str | None
    source_url: str | None
    row: int


class Index:
    """An opened index file; cheap to open, because only what a search touches is read."""

    def __init__(self, contents: Contents, photos: Photos, path: Path) -> None:
        self._graph, self._photos, self._rows = contents.graph, contents.photos, contents.rows
        self._source, self._path = photos, path
        self.meta = contents.meta

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "Index":
        """verify: compare a large file with its sha256 as well. Raises IndexFileError."""
        contents = open_index(path, verify=verify)
        return cls(contents, photos_of(contents.meta["photos"], Store(storage_uri())), path)

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self._graph)

    @cached_property
    def labels(self) -> dict[str, int]:
        """Number of boxes by class, the most frequent first."""
        counted = pc.value_counts(self._labels)
        counts = {row["values"]: row["counts"] for row in counted.to_pylist()}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def backbone(self, model: Path | None = None) -> Backbone:
        """The index's own backbone. model: its folder, if it has moved. Raises FindError, ModelError."""
        made_with = str(self.meta["backbone"])
        where = model or Path(self.meta["model"])
        backbone = load_exemplar_backbone(where)[0].to(default_device())
        if backbone_key(backbone) != made_with:
            raise FindError(
                f"{self._path} was made with backbone {made_with}, but {where} has {backbone_key(backbone)}: give its "
                "model, or index again"
            )
        return backbone

    def find(
        self,
        *,
        like: np.ndarray | None = None,
        label: str | None = None,
        k: int = 12,
        backbone: Backbone | None = None,
        one_per_photo: bool = True,
    ) -> list[Hit]:
        """The k boxes nearest to a picture, or fewer if there are no more; the nearest first.

        like: (H, W, 3) uint8; without it, the boxes of the class that are most typical, that is, nearest to its mean.
        label: only boxes of this class, all of them compared; in lower case too. backbone: from `backbone()`, for
        `like`. one_per_photo: of several boxes of a photo only the best, or a crowd in one photo would hide the others.
        Raises FindError.
        """
        if like is None and label is None:
            raise FindError("nothing to find: give a picture, a class, or both")
        candidates = None if label is None else self._rows_of(label)
        if like is not None:
            query = self._vector_of(like, backbone)
        else:
            assert candidates is not None
            query = self._mean(candidates)
        return self.nearest(query, candidates, k=k, one_per_photo=one_per_photo)

    def find_text(
        self,
        words: str,
        *,
        label: str | None = None,
        k: int = 12,
        one_per_photo: bool = True,
        model: Path | None = None,
    ) -> list[Hit]:
        """The k boxes that fit the words best; distance is 1 - cosine in CLIP's space of pictures and words.

        The index must have been made with a whole CLIP folder: a model's image encoder has neither a text tower nor a
        projection. The index has class tokens v, whose angle to the words w is not that of their projections W v. But
        w . W v = (W' w) . v: the graph's nearest to W' w are candidates, and their projections are compared.
        Raises FindError.
        """
        direction, projection = text_query(self.backbone(model), model or Path(self.meta["model"]), words)
        rows = np.arange(len(self)) if label is None else self._rows_of(label)
        if label is None and len(self) > EXACT_ROWS:
            towards = direction @ projection
            rows = self._graph.search(towards, min(TEXT_CANDIDATES, len(self))).keys.astype(np.int64)
        near = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), SCAN_ROWS):
            projected = self._vectors(rows[start : start + SCAN_ROWS]) @ projection.T
            near[start : start + SCAN_ROWS] = 1 - projected @ direction / np.linalg.norm(projected, axis=1)
        return self._best(rows, near, k=k, one_per_photo=one_per_photo)

    def nearest(self, query: np.ndarray, candidates: np.ndarray | None, *, k: int, one_per_photo: bool) -> list[Hit]:
        """The hits of a (width,) unit vector. candidates: rows to compare, all of them; None: any row, by the graph."""
        if candidates is None and len(self) <= EXACT_ROWS:
            candidates = np.arange(len(self))
        if candidates is not None:
            return self._best(candidates, self._distances(query, candidates), k=k, one_per_photo=one_per_photo)
        wanted = k * OVERSAMPLING if one_per_photo else k
        while True:
            found = self._graph.search(query.astype(np.float32), min(wanted, len(self)))
            hits = self._best(found.keys.astype(np.int64), found.distances, k=k, one_per_photo=one_per_photo)
            if len(hits) == k or wanted >= len(self):
                return hits
            wanted *= OVERSAMPLING

    def crop_of(self, hit: Hit) -> np.ndarray:
        """(h, w, 3) uint8: the box's part of its photo, padded as in training. Raises PhotoGoneError."""
        row = self._rows.slice(hit.row, 1).to_pylist()[0]
        photo = read_photo(self._source, self._photos.slice(row["photo"], 1).to_pylist()[0])
        area = area_of(row, photo, int(self.meta["pad_px"]))
        return photo[area.y0 : area.y1, area.x0 : area.x1]

    # -- inside -----------------------------------------------------------------------------------------------------

    @cached_property
    def _labels(self) -> pa.ChunkedArray:
        return self._rows.column("label_name").cast(pa.string())

    @cached_property
    def _photo_of(self) -> np.ndarray:
        """(N,) number of each box's photo."""
        return self._rows.column("photo").to_numpy()

    def _rows_of(self, label: str) -> np.ndarray:
        folded: dict[str, list[str]] = {}
        for name in self.labels:
            folded.setdefault(name.casefold(), []).append(name)
        named = [label] if label in self.labels else folded.get(label.casefold(), [])
        if not named:
            near = difflib.get_close_matches(label.casefold(), folded, n=5, cutoff=0.5)
            names = [folded[name][0] for name in near] or list(self.labels)[:10]
            said = "the closest are" if near else "there are"
            raise FindError(f"{self._path} has no box of class {label}; {said} {', '.join(names)}")
        return np.flatnonzero(pc.is_in(self._labels, pa.array(named, pa.string())).to_numpy())

    def _vector_of(self, like: np.ndarray, backbone: Backbone | None) -> np.ndarray:
        if backbone is None:
            raise FindError("a picture can only be compared with the index's backbone: pass index.backbone()")
        if backbone_key(backbone) != self.meta["backbone"]:
            raise FindError(
                f"{self._path} was made with backbone {self.meta['backbone']}, the picture would be compared with "
                f"{backbone_key(backbone)}: take the index's, or index again"
            )
        return embed([squashed(like, backbone)], ["the picture"], backbone, default_device())[0]

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._graph.get(rows.astype(np.uint64)), np.float32)

    def _mean(self, rows: np.ndarray) -> np.ndarray:
        total = np.zeros(self._graph.ndim, np.float64)
        for start in range(0, len(rows), SCAN_ROWS):
            total += self._vectors(rows[start : start + SCAN_ROWS]).sum(0, dtype=np.float64)
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    def _distances(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n,) 1 - cosine of each row; stored vectors have unit length but for float16's rounding."""
        out = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), SCAN_ROWS):
            vectors = self._vectors(rows[start : start + SCAN_ROWS])
            out[start : start + SCAN_ROWS] = 1 - vectors @ query / np.linalg.norm(vectors, axis=1)
        return out

    def _best(self, rows: np.ndarray, distances: np.ndarray, *, k: int, one_per_photo: bool) -> list[Hit]:
        order = np.argsort(distances, kind="stable")
        rows, distances = rows[order], distances[order]
        if one_per_photo:
            first = np.sort(np.unique(self._photo_of[rows], return_index=True)[1])
            rows, distances = rows[first], distances[first]
        return [self._hit(int(row), float(near)) for row, near in zip(rows[:k], distances[:k], strict=True)]

    def _hit(self, number: int, distance: float) -> Hit:
        row = self._rows.slice(number, 1).to_pylist()[0]
        photo = self._photos.slice(row["photo"], 1).to_pylist()[0]
        return Hit(
            image_id=photo["image_id"],
            box_index=row["box_index"],
            box=(row["xmin"], row["ymin"], row["xmax"], row["ymax"]),
            label_name=row["label_name"],
            distance=max(0.0, distance),
            license=photo["license"],
            author=photo["author"],
            source_url=photo["source_url"],
            row=number,
        )
