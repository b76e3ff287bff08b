"""Feature extraction for `evaluate` and `sweep`: each picture is processed once per extractor, with one reference set.

Features are parts named by the content of the pictures and of the weights, so another metric or run reuses them.
Metrics are computed from features and need no Ray.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial, reduce
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pbe.data import images
from pbe.data.files import named
from pbe.data.schema import BENCH, EDITS, FEATURES, PIXELS, REAL_IMAGES, HoleKind, require, without_empty
from pbe.evaluate.bench.scopes import Scope
from pbe.evaluate.features.crops import Crop, Decode, bench_crops, edited_crops, median_hole_px, real_crops, square
from pbe.evaluate.features.extractors import Extractor
from pbe.evaluate.features.tables import Features, FeatureTable, PixelTable, count_pixels
from pbe.evaluate.features.weights import Entry, open_extractor, open_lpips, store_extractor, store_lpips
from pbe.evaluate.metrics.frechet import (
    Card,
    FeatureStatistics,
    feature_statistics,
    merge,
    refuse_other_extractor,
    statistics_bytes,
    statistics_from_bytes,
)
from pbe.evaluate.metrics.mixture import Mixture, load_mixture, mixture_digest
from pbe.evaluate.metrics.retrieval import candidates_of
from pbe.evaluate.reference_set import make_reference_set
from pbe.evaluate.score import Method
from pbe.evaluate.score_features import ReferenceSet
from pbe.evaluate.settings import ClipExtractorConfig, EvaluateConfig, Region
from pbe.model.precision import float32_products
from pbe.places import local_path
from pbe.store import File, Manifest, Record, Store, digest, load_manifest
from pipelines.runtime.parts import Unit, Work, run_groups, torch_device
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage, StageError

# names features, pixel counts and statistics, in place of the code: raise it when one changes for the same pictures and
# weights. What is computed on them has the versions of its stages
VERSION = 5
PIXEL_COUNTS = "pixels"  # stands among the extractors' names
REAL_IMAGES_PER_UNIT = 500


@dataclass(frozen=True)
class Extracted:
    """Features of the bench, the real images and each method's edits, with the reference sets.

    image_ids: image id by bench id. card: provenance of every number computed from these features.
    """

    edits: Mapping[str, Sequence[File]]
    parts: "FeatureParts"
    bench_features: Mapping[str, FeatureTable]
    reference_sets: Mapping[str, ReferenceSet]
    image_ids: Mapping[str, str]
    card: Mapping[str, Any]

    def method(self, store: Store, name: str) -> Method:
        keys = ["bench_id", "hole_kind", "reference_kind", "seed"]
        rows = [row for file in self.edits[name] for row in store.read_table(file, columns=keys).to_pylist()]
        features = {extractor: self.parts.features(extractor, name) for extractor in self.reference_sets}
        return Method(rows, features, self.bench_features, self.parts.counts(name), self.image_ids)


class FeatureParts:
    """Records of the features, by extractor and by what they are of (bench, real_images, or a method's name)."""

    def __init__(self, store: Store, records: Mapping[tuple[str, str], Sequence[Record]]) -> None:
        self._store, self._records = store, records

    def features(self, extractor: str, of: str) -> FeatureTable:
        return FeatureTable(
            [require(self._store.read_table(file), FEATURES, file.path) for file in self.files(extractor, of)]
        )

    def counts(self, method: str) -> PixelTable:
        files = [record.file("pixels") for record in self._records[PIXEL_COUNTS, method]]
        return PixelTable([require(self._store.read_table(file), PIXELS, file.path) for file in files])

    def files(self, extractor: str, of: str) -> list[File]:
        return [record.file("features") for record in self._records[extractor, of]]

    def digest(self, extractor: str, of: str) -> str:
        return digest([file.sha256 for file in self.files(extractor, of)])

    @property
    def records(self) -> list[Record]:
        return [record for found in self._records.values() for record in found]


def extract_features(stage: Stage, edits: Mapping[str, Sequence[File]]) -> Extracted:
    """Extract features of the bench, the real images and every method's edits (by the method's name).

    Raises StageError for too few real images or an extractor that fails.
    """
    cfg, bench_manifest = stage.params.evaluate, load_manifest(stage.input("bench"))
    bench_file = bench_manifest.files("bench")[0]
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    entries: dict[str, Entry] = {
        extractor.kind: store_extractor(stage.store, extractor) for extractor in cfg.extractors
    }
    opened = {name: open_extractor(stage.store, entry) for name, entry in entries.items()}
    lpips = store_lpips(stage.store, cfg.lpips) if cfg.lpips else None
    parts = _extract_all(stage, cfg, bench_manifest, edits, entries, lpips)
    bench_features = {name: parts.features(name, "bench") for name in entries}
    for name, extractor in opened.items():
        if name == "clip" and not extractor.paper:
            print(
                "evaluate: this CLIP is not ViT-B/32: do not compare its clip_fid, qs, clip_score with published ones"
            )
    statistics = {name: _store_statistics(stage.store, name, extractor, parts) for name, extractor in opened.items()}
    mixtures = _mixtures(cfg)
    reference_sets = {
        name: _reference_set(
            cfg,
            extractor,
            parts,
            bench_features[name],
            statistics[name][0],
            mixtures.get(name),
            stage.params.edit.holes,
        )
        for name, extractor in opened.items()
    }
    card = {
        "bench": {**bench_manifest.config, "sha256": bench_file.sha256, "items": bench_file.rows},
        "data_digest": load_manifest(stage.input("ingest")).digest,
        "extractors": {
            name: {
                "digest": extractor.digest,
                "resize_rule": extractor.resize_rule,
                "papers_network": extractor.paper,
                "reference_digest": parts.digest(name, "real_images"),
                "reference_n": statistics[name][0].n,
                "reference_statistics": statistics[name][1],
                "exemplars_n": len(reference_sets[name].exemplars.vectors),
                **({"mixture_digest": mixture_digest(mixtures[name])[:16]} if name in mixtures else {}),
            }
            for name, extractor in opened.items()
        },
        **({"lpips": {"net": lpips["net"], "digest": lpips["digest"]}} if lpips else {}),
        "reference": cfg.real_images or "untouched crops of the bench's boxes",
        "resampling_seed": cfg.statistics.seed,
        "git_commit": provenance_tags(stage.root)["git_commit"],
    }
    image_ids = dict(zip(*(bench.column(name).to_pylist() for name in ("bench_id", "image_id")), strict=True))
    return Extracted(edits, parts, bench_features, reference_sets, image_ids, card)


# -- reference statistics ------------------------------------------------------------------------------------------


def _store_statistics(
    store: Store, name: str, extractor: Extractor, parts: FeatureParts
) -> tuple[FeatureStatistics, str]:
    """Return the statistics of the real images, merged from their parts, and the path of their stored file.

    A set of 40,000 photos is processed once, and the file can be shared.
    """
    card = Card(name, extractor.digest, extractor.resize_rule)
    folder = f"parts/statistics/{name}-{digest([VERSION, parts.digest(name, 'real_images'), asdict(card)])}"
    path = f"{folder}/statistics.npz"
    if store.exists(f"{folder}/record.json"):
        statistics, found = statistics_from_bytes(store.read_bytes(path), path)
        refuse_other_extractor(found, card, path)
        return statistics, path
    try:
        statistics = reduce(merge, (_statistics_of(store, file) for file in parts.files(name, "real_images")))
    except ValueError as error:
        raise StageError(f"evaluate: {name}: the real images: {error}") from None
    store.write_bytes(path, statistics_bytes(statistics, card))
    store.write_bytes(f"{folder}/record.json", b'{"files": ["statistics.npz"]}')
    return statistics, path


def _statistics_of(store: Store, file: File) -> FeatureStatistics:
    return feature_statistics(FeatureTable([require(store.read_table(file), FEATURES, file.path)]).all_of("whole"))


def _mixtures(cfg: EvaluateConfig) -> dict[str, Mixture]:
    """Load the mixtures that params.yaml names, by extractor."""
    named = {
        extractor.kind: extractor.mixture
        for extractor in cfg.extractors
        if isinstance(extractor, ClipExtractorConfig) and extractor.mixture
    }
    return {extractor: load_mixture(local_path(path)) for extractor, path in named.items()}


def _reference_set(
    cfg: EvaluateConfig,
    extractor: Extractor,
    parts: FeatureParts,
    bench: FeatureTable,
    statistics: FeatureStatistics,
    mixture: Mixture | None,
    holes: Sequence[HoleKind],
) -> ReferenceSet:
    name = extractor.name
    views = [f"{hole}/{view}" for hole in holes for view in ("region", "masked")]
    try:
        return make_reference_set(
            name,
            real_images=parts.features(name, "real_images").all_of("whole"),
            statistics=statistics,
            bench_photos=bench.all_of("source"),
            photo_holes={view: bench.all_of(view) for view in views},
            exemplars=candidates_of(bench.keys_of("exemplar"), bench.all_of("exemplar")),
            mixture=mixture,
            upstream_region=_region(cfg, name) == "upstream",
            cmmds_network=extractor.cmmds_network,
            components=cfg.quality_components,
            pca_dims=cfg.quality_pca_dims,
            seed=cfg.statistics.seed,
        )
    except ValueError as error:
        raise StageError(
            f"evaluate: {name}: the real images: {error}; lower evaluate.quality_components, or "
            "give more of them (bench.crops_per_box, bench.max_items, evaluate.real_images)"
        ) from None


# -- extraction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """One unit: an extractor and its pictures (bench, real_images, edits, or photos of a folder)."""

    extractor: str
    what: str
    file: File | None
    photos: tuple[tuple[str, int, int], ...] = ()  # path, bytes, mtime in ns

    @property
    def pictures(self) -> tuple[Any, ...]:
        """Equal for extractions of the same pictures."""
        return self.what, self.file, self.photos


def _extract_all(
    stage: Stage,
    cfg: EvaluateConfig,
    bench: Manifest,
    edits: Mapping[str, Sequence[File]],
    extractors: Mapping[str, Entry],
    lpips: Entry | None,
) -> FeatureParts:
    bench_file = bench.files("bench")[0]
    wanted: list[tuple[str, Extraction]] = []  # what the features are of, and the extraction
    for extractor in extractors:
        wanted.append(("bench", Extraction(extractor, "bench", bench_file)))
        wanted += [("real_images", at) for at in _extractions_of_real_images(cfg, extractor, bench)]
    for name, files in edits.items():
        for extractor in (*extractors, PIXEL_COUNTS):
            wanted += [(name, Extraction(extractor, "edits", file)) for file in files]
    scopes = _scopes(stage)
    # no number in the label: a method that comes or goes must not rename the others' parts
    identity = partial(_identity, {**extractors, PIXEL_COUNTS: lpips or {}}, bench_file, scopes, cfg)
    units = [Unit(f"{at.extractor}-{at.what}", identity(at), at) for _, at in wanted]
    together: dict[tuple[Any, ...], list[int]] = {}  # places of the units of the same pictures
    for place, (_, at) in enumerate(wanted):
        together.setdefault(at.pictures, []).append(place)
    # the largest first: an actor that began one last would work alone
    groups = sorted(together.values(), key=lambda places: _count(wanted[places[0]][1]), reverse=True)
    found = run_groups(
        stage,
        "features",
        [[units[place] for place in places] for places in groups],
        worker=partial(_worker, stage.store, cfg, extractors, lpips, bench_file, scopes),
        each=cfg.per_actor,
        key="evaluate",
        actors=cfg.actors,
    )
    records = dict(zip(chain(*groups), found, strict=True))
    by_extractor: dict[tuple[str, str], list[Record]] = {}
    for place, (of, at) in enumerate(wanted):
        by_extractor.setdefault((at.extractor, of), []).append(records[place])
    return FeatureParts(stage.store, by_extractor)


def _count(at: Extraction) -> int:
    return at.file.rows if at.file else len(at.photos)


def _scopes(stage: Stage) -> list[Scope]:
    return [(hole, reference) for hole in stage.params.edit.holes for reference in stage.params.edit.references]


def _identity(
    extractors: Mapping[str, Entry],
    bench_file: File,
    scopes: Sequence[Scope],
    cfg: EvaluateConfig,
    at: Extraction,
) -> str:
    """Digest of the pictures and the extractor's weights; the bench is included only where crops depend on it."""
    of = at.file.sha256 if at.file else [at.photos, cfg.real_images_px]
    return digest(
        [
            "features",
            VERSION,
            at.what,
            dict(extractors.get(at.extractor, {})),
            of,
            bench_file.sha256 if at.what == "edits" else None,
            scopes if at.what == "bench" else None,
            _region(cfg, at.extractor) if at.what in ("bench", "edits") else None,
        ]
    )


def _extractions_of_real_images(cfg: EvaluateConfig, extractor: str, bench: Manifest) -> list[Extraction]:
    if cfg.real_images is None:
        file = bench.files("real")[0]
        if not file.rows:
            raise StageError(
                "evaluate.real_images: this bench has no real images; name a folder of photos. The paper's are all of "
                "COCO test2017, with evaluate.real_images_px: 512"
            )
        return [Extraction(extractor, "real_images", file)]
    folder = local_path(cfg.real_images)
    if not folder.is_dir():
        raise StageError(f"evaluate.real_images = {cfg.real_images}: no such folder ({folder})")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    files = [path for path in entries if path.is_file()]
    if strange := [str(path) for path in entries if not path.is_file()]:
        raise StageError(f"evaluate.real_images: {named(strange)}: pipes, devices or broken links; remove them")
    if len(files) < 2:
        raise StageError(
            f"evaluate.real_images = {cfg.real_images}: {len(files)} photos in {folder}; a reference set needs more"
        )
    # path, size and mtime stand for the content: hashing 40,000 photos would cost as much as extracting their features.
    # links are not resolved: links to photos of one name in several folders are several photos
    known = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    starts = range(0, len(known), REAL_IMAGES_PER_UNIT)
    return [
        Extraction(extractor, "folder", None, tuple(known[start : start + REAL_IMAGES_PER_UNIT])) for start in starts
    ]


def _worker(
    store: Store,
    cfg: EvaluateConfig,
    extractors: Mapping[str, Entry],
    lpips: Entry | None,
    bench_file: File,
    scopes: Sequence[Scope],
) -> Work:
    import torch

    torch.set_num_threads(1)
    device = torch_device(cfg.per_actor)
    opened = {name: open_extractor(store, entry, device=device) for name, entry in extractors.items()}
    opened_lpips = open_lpips(store, lpips, device=device) if lpips else None
    bench = {row["bench_id"]: row for row in store.read_table(bench_file).to_pylist()}
    median_px = median_hole_px(bench.values())

    def pictures(at: Extraction) -> Iterable[Any]:
        """Rows, or the photos of a folder as crops."""
        if at.file is None:
            return (_folder_crop(Path(path), cfg) for path, _, _ in at.photos)
        schema = {"bench": BENCH, "real_images": REAL_IMAGES, "edits": EDITS}[at.what]
        return require(store.read_table(at.file), schema, at.file.path).to_pylist()

    def crops(at: Extraction, some: Sequence[Any], decode: Decode) -> Iterable[Crop]:
        region = _region(cfg, at.extractor)
        match at.what:
            case "folder":
                return some
            case "bench":
                matched = opened[at.extractor].matches_resolution
                return bench_crops(some, scopes, matched=matched, median_px=median_px, region=region, decode=decode)
            case "real_images":
                return real_crops(some, decode=decode)
        return edited_crops(some, bench, region=region, decode=decode)

    @float32_products(tf32=False)  # a part's name says nothing of the device
    def work(units: Sequence[Unit]) -> list[Record]:
        """Run extractions of the same pictures, which are decoded once for all."""
        extractions: list[Extraction] = [unit.payload for unit in units]
        features = {
            at.extractor: Features(opened[at.extractor], batch_rows=cfg.batch_rows)
            for at in extractions
            if at.extractor != PIXEL_COUNTS
        }
        pixels = [PIXELS.empty_table()]
        left = iter(pictures(extractions[0]))
        while some := list(islice(left, cfg.batch_rows)):
            decode = cache(images.decode)
            for at in extractions:
                if at.extractor == PIXEL_COUNTS:
                    pixels.append(count_pixels(some, bench, lpips=opened_lpips, decode=decode))
                else:
                    with _naming(store, at):
                        features[at.extractor].add(crops(at, some, decode))
        return [write(unit, features, pixels) for unit in units]

    def write(unit: Unit, features: Mapping[str, Features], pixels: Sequence[pa.Table]) -> Record:
        at: Extraction = unit.payload
        if at.extractor == PIXEL_COUNTS:
            joined = pa.concat_tables(pixels, promote_options="default").combine_chunks()
            tables = {"pixels": without_empty(joined)}
        else:
            with _naming(store, at):
                tables = {"features": features[at.extractor].table()}
        counts = {"rows": sum(table.num_rows for table in tables.values())}
        return store.write_unit("features", unit.name, tables, counts=counts)

    return work


@contextmanager
def _naming(store: Store, at: Extraction) -> Iterator[None]:
    """Raise StageError with the extractor and its pictures for an error of theirs."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # RuntimeError: a TorchScript file may hold any network
        what = store.full_uri(at.file.path) if at.file else "the photos of evaluate.real_images"
        raise StageError(f"evaluate: {at.extractor} on {what}: {' '.join(str(error).split())[:300]}") from error


def _region(cfg: EvaluateConfig, extractor: str) -> Region:
    """Return the region to crop; only the CLIP score may use upstream's."""
    return cfg.clip_region if extractor == "clip" else "whole"


def _folder_crop(path: Path, cfg: EvaluateConfig) -> Crop:
    assert cfg.real_images_px is not None
    try:
        return Crop(path.name, "whole", "whole", square(images.open_picture(path).stored(), cfg.real_images_px))
    except (images.ImageError, OSError) as error:
        raise StageError(f"evaluate.real_images: {path}: {error}; remove it from the folder") from None
