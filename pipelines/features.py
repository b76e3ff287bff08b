"""What `evaluate` and `sweep` share: judges look at each picture once, and measure by the same untouched photos.

Features are parts named by the content of the pictures and of the weights, so that a second metric, or another run,
costs no second look. What is computed on features needs no Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

from pbe.data import images
from pbe.data.schema import BENCH, EDITS, FEATURES, PIXELS, REALS, require
from pbe.evaluate.features.crops import View, bench_views, edit_views, real_views, square
from pbe.evaluate.features.extractors import Extractor
from pbe.evaluate.features.tables import Counts, Looks, count_pixels, look
from pbe.evaluate.features.weights import Entry, keep_judge, open_judge
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
from pbe.evaluate.scale import make_scale
from pbe.evaluate.score import JudgeScale, Method
from pbe.evaluate.settings import ClipJudge, EvaluateConfig, Region
from pbe.places import repo_root
from pbe.store import File, Manifest, Record, Store, digest, load_manifest
from pipelines.runtime.parts import Unit, run_units, torch_device
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage, StageError

# names features, pixel counts and statistics, in place of the code: raise it when one changes for the same pictures and
# weights. What is computed on them has the versions of its stages
VERSION = 1
PIXEL_COUNTS = "pixels"  # beside the judges' names
REALS_PER_UNIT = 500


@dataclass(frozen=True)
class Judged:
    """What the judges saw of the bench, of untouched photos and of each method's edits, and what they measure by.

    photos: image id of each bench id. card: what every number made of this was computed with.
    """

    edits: Mapping[str, Sequence[File]]
    seen: "Seen"
    bench_looks: Mapping[str, Looks]
    scales: Mapping[str, JudgeScale]
    photos: Mapping[str, str]
    card: Mapping[str, Any]

    def method(self, store: Store, name: str) -> Method:
        keys = ["bench_id", "hole_kind", "reference_kind", "seed"]
        rows = [row for file in self.edits[name] for row in store.read_table(file, columns=keys).to_pylist()]
        looks = {judge: self.seen.features(judge, name) for judge in self.scales}
        return Method(rows, looks, self.bench_looks, self.seen.counts(name), self.photos)


class Seen:
    """Records of the looks, by judge and by what was looked at (bench, reals, or a method's name)."""

    def __init__(self, store: Store, records: Mapping[tuple[str, str], Sequence[Record]]) -> None:
        self._store, self._records = store, records

    def features(self, judge: str, of: str) -> Looks:
        return Looks([require(self._store.read_table(file), FEATURES, file.path) for file in self.files(judge, of)])

    def counts(self, method: str) -> Counts:
        files = [record.file("pixels") for record in self._records[PIXEL_COUNTS, method]]
        return Counts([require(self._store.read_table(file), PIXELS, file.path) for file in files])

    def files(self, judge: str, of: str) -> list[File]:
        return [record.file("features") for record in self._records[judge, of]]

    def digest(self, judge: str, of: str) -> str:
        return digest([file.sha256 for file in self.files(judge, of)])

    @property
    def records(self) -> list[Record]:
        return [record for found in self._records.values() for record in found]


def judge_edits(stage: Stage, edits: Mapping[str, Sequence[File]]) -> Judged:
    """Looks at the edits of all methods, by their names, and at what they are measured by."""
    cfg, bench_manifest = stage.params.evaluate, load_manifest(stage.input("bench"))
    bench_file = bench_manifest.files("bench")[0]
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    entries: dict[str, Entry] = {judge.kind: keep_judge(stage.store, judge) for judge in cfg.judges}
    opened = {name: open_judge(stage.store, entry) for name, entry in entries.items()}
    seen = _look_at_all(stage, cfg, bench_manifest, edits, entries)
    bench_looks = {name: seen.features(name, "bench") for name in entries}
    for name, judge in opened.items():
        if name == "clip" and not judge.paper:
            print(
                "evaluate: this CLIP is not ViT-B/32: its clip_fid, qs and clip_score compare with no published number"
            )
    statistics = {name: _keep_statistics(stage.store, name, judge, seen) for name, judge in opened.items()}
    mixtures = _mixtures(cfg)
    scales = {
        name: _scale(cfg, judge, seen, bench_looks[name], statistics[name][0], mixtures.get(name))
        for name, judge in opened.items()
    }
    card = {
        "bench": {**bench_manifest.config, "sha256": bench_file.sha256, "items": bench_file.rows},
        "data_digest": load_manifest(stage.input("ingest")).digest,
        "extractors": {
            name: {
                "digest": judge.digest,
                "resize_rule": judge.resize_rule,
                "papers_network": judge.paper,
                "reference_digest": seen.digest(name, "reals"),
                "reference_n": statistics[name][0].n,
                "reference_statistics": statistics[name][1],
                **({"mixture_digest": mixture_digest(mixtures[name])[:16]} if name in mixtures else {}),
            }
            for name, judge in opened.items()
        },
        "reference": cfg.reals or "untouched crops of the bench's boxes",
        "resampling_seed": cfg.statistics.seed,
        "git_commit": provenance_tags(stage.root)["git_commit"],
    }
    photos = dict(zip(*(bench.column(name).to_pylist() for name in ("bench_id", "image_id")), strict=True))
    return Judged(edits, seen, bench_looks, scales, photos, card)


# -- what is measured by -------------------------------------------------------------------------------------------


def _keep_statistics(store: Store, name: str, judge: Extractor, seen: Seen) -> tuple[FeatureStatistics, str]:
    """Of the untouched photos, merged from their parts, and the path of the file that keeps them: a set of 40,000
    photos is summed up once, and the file can be passed on."""
    card = Card(name, judge.digest, judge.resize_rule)
    folder = f"parts/statistics/{name}-{digest([VERSION, seen.digest(name, 'reals'), asdict(card)])}"
    path = f"{folder}/statistics.npz"
    if store.exists(f"{folder}/record.json"):
        statistics, found = statistics_from_bytes(store.read_bytes(path), path)
        refuse_other_extractor(found, card, path)
        return statistics, path
    try:
        statistics = reduce(merge, (_statistics_of(store, file) for file in seen.files(name, "reals")))
    except ValueError as error:
        raise StageError(f"evaluate: the untouched photos that {name} measures by: {error}") from None
    store.write_bytes(path, statistics_bytes(statistics, card))
    store.write_bytes(f"{folder}/record.json", b'{"files": ["statistics.npz"]}')
    return statistics, path


def _statistics_of(store: Store, file: File) -> FeatureStatistics:
    return feature_statistics(Looks([require(store.read_table(file), FEATURES, file.path)]).all_of("whole"))


def _mixtures(cfg: EvaluateConfig) -> dict[str, Mixture]:
    """By judge: those that params.yaml names."""
    named = {judge.kind: judge.mixture for judge in cfg.judges if isinstance(judge, ClipJudge) and judge.mixture}
    return {judge: load_mixture(repo_root() / Path(path).expanduser()) for judge, path in named.items()}


def _scale(
    cfg: EvaluateConfig,
    extractor: Extractor,
    seen: Seen,
    bench: Looks,
    statistics: FeatureStatistics,
    mixture: Mixture | None,
) -> JudgeScale:
    judge = extractor.name
    try:
        return make_scale(
            judge,
            reals=seen.features(judge, "reals").all_of("whole"),
            statistics=statistics,
            photos=bench.all_of("source"),
            mixture=mixture,
            upstream_region=_region(cfg, judge) == "upstream",
            components=cfg.quality_components,
            pca_dims=cfg.quality_pca_dims,
            seed=cfg.statistics.seed,
        )
    except ValueError as error:
        raise StageError(
            f"evaluate: the untouched photos that {judge} measures by: {error}; lower evaluate.quality_components, or "
            "give more of them (bench.crops_per_box, bench.max_items, evaluate.reals)"
        ) from None


# -- looking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One unit: what is looked at (bench, reals, edits, or photos of a folder), and by whom."""

    judge: str
    what: str
    file: File | None
    photos: tuple[tuple[str, int, int], ...] = ()  # path, bytes, ns of the last change


def _look_at_all(
    stage: Stage,
    cfg: EvaluateConfig,
    bench: Manifest,
    edits: Mapping[str, Sequence[File]],
    judges: Mapping[str, Entry],
) -> Seen:
    bench_file = bench.files("bench")[0]
    wanted: list[tuple[str, Look]] = []  # of what, and the look
    for judge in judges:
        wanted.append(("bench", Look(judge, "bench", bench_file)))
        wanted += [("reals", at) for at in _looks_at_reals(cfg, judge, bench)]
    for name, files in edits.items():
        for judge in (*judges, PIXEL_COUNTS):
            wanted += [(name, Look(judge, "edits", file)) for file in files]
    scopes = _scopes(stage)
    # no number in the label: a method that comes or goes must not rename the others' parts
    identity = partial(_identity, judges, bench_file, scopes, cfg)
    units = [Unit(f"{at.judge}-{at.what}", identity(at), at) for _, at in wanted]
    worker = partial(_worker, stage.store, cfg, judges, bench_file, scopes)
    records = run_units(
        stage,
        "look",
        units,
        worker=worker,
        each=cfg.per_actor,
        key="evaluate",
        actors=cfg.actors,
    )
    found: dict[tuple[str, str], list[Record]] = {}
    for (of, at), record in zip(wanted, records, strict=True):
        found.setdefault((at.judge, of), []).append(record)
    return Seen(stage.store, found)


def _scopes(stage: Stage) -> list[tuple[str, str]]:
    return [(hole, reference) for hole in stage.params.edit.holes for reference in stage.params.edit.references]


def _identity(
    judges: Mapping[str, Entry],
    bench_file: File,
    scopes: Sequence[tuple[str, str]],
    cfg: EvaluateConfig,
    at: Look,
) -> str:
    """The content that is looked at, and the weights that at. The bench has a say where holes and references do."""
    of = at.file.sha256 if at.file else [at.photos, cfg.reals_px]
    return digest(
        [
            "look",
            VERSION,
            at.what,
            dict(judges.get(at.judge, {})),
            of,
            bench_file.sha256 if at.what == "edits" else None,
            scopes if at.what == "bench" else None,
            _region(cfg, at.judge) if at.what == "edits" else None,
        ]
    )


def _looks_at_reals(cfg: EvaluateConfig, judge: str, bench: Manifest) -> list[Look]:
    if cfg.reals is None:
        file = bench.files("real")[0]
        if not file.rows:
            raise StageError(
                "evaluate.reals: this bench brings no untouched photos; name a folder of them. The paper's are all of "
                "COCO test2017, with evaluate.reals_px: 512"
            )
        return [Look(judge, "reals", file)]
    folder = repo_root() / Path(cfg.reals).expanduser()
    if not folder.is_dir():
        raise StageError(f"evaluate.reals = {cfg.reals}: no such folder ({folder})")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(files) < 2:
        raise StageError(f"evaluate.reals = {cfg.reals}: {len(files)} photos in {folder}; a reference set needs more")
    # name, size and date stand for the content: reading 40,000 photos to name a part would cost as much as looking
    # under its own name: links to photos of one name in several folders are several photos
    known = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    starts = range(0, len(known), REALS_PER_UNIT)
    return [Look(judge, "folder", None, tuple(known[start : start + REALS_PER_UNIT])) for start in starts]


def _worker(
    store: Store,
    cfg: EvaluateConfig,
    judges: Mapping[str, Entry],
    bench_file: File,
    scopes: Sequence[tuple[str, str]],
) -> Callable[[Unit], Record]:
    import torch

    torch.set_num_threads(1)
    device = torch_device(cfg.per_actor)
    opened = {name: open_judge(store, entry, device=device) for name, entry in judges.items()}
    bench = {row["bench_id"]: row for row in store.read_table(bench_file).to_pylist()}

    def views(at: Look) -> Any:
        if at.file is None:
            return (_folder_view(Path(path), cfg) for path, _, _ in at.photos)
        schema = {"bench": BENCH, "reals": REALS, "edits": EDITS}[at.what]
        rows = require(store.read_table(at.file), schema, at.file.path).to_pylist()
        if at.what == "bench":
            return bench_views(rows, scopes, matched=opened[at.judge].matches_resolution)
        return real_views(rows) if at.what == "reals" else edit_views(rows, bench, region=_region(cfg, at.judge))

    def work(unit: Unit) -> Record:
        at: Look = unit.payload
        if at.judge == PIXEL_COUNTS:
            assert at.file is not None
            table = count_pixels(store.read_table(at.file).to_pylist(), bench)
            return store.write_unit("look", unit.name, {"pixels": table}, counts={"rows": table.num_rows})
        try:
            table = look(views(at), opened[at.judge], batch_rows=cfg.batch_rows)
        except (ValueError, RuntimeError) as error:  # of a network too: a TorchScript file may be anybody's
            what = store.full_uri(at.file.path) if at.file else "the photos of evaluate.reals"
            raise StageError(f"evaluate: {at.judge} at {what}: {' '.join(str(error).split())[:300]}") from error
        return store.write_unit("look", unit.name, {"features": table}, counts={"rows": table.num_rows})

    return work


def _region(cfg: EvaluateConfig, judge: str) -> Region:
    """Upstream's is of the CLIP score alone."""
    return cfg.clip_region if judge == "clip" else "whole"


def _folder_view(path: Path, cfg: EvaluateConfig) -> View:
    assert cfg.reals_px is not None
    try:
        return View(path.name, "whole", "whole", square(images.decode(path.read_bytes()), cfg.reals_px))
    except (images.ImageError, OSError) as error:
        raise StageError(f"evaluate.reals: {path}: {error}; remove it from the folder") from None
