"""evaluate: all methods on one bench, in one table. Variants, baselines and results of others are rows alike.

Judges look at each picture once: their features are parts named by the content of the edits and of the weights, so that
a second metric, or another run, costs no second look. What is computed on features needs no Ray.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe import track
from pbe.config import ClipJudge, EvaluateConfig, repo_root, tracking_uri
from pbe.data import images
from pbe.data.schema import BENCH, EDITS, FEATURES, PIXELS, REALS, SCORES, require
from pbe.evaluate.grid import edit_grid
from pbe.evaluate.judges import Entry, keep_judge, open_judge
from pbe.evaluate.look import Counts, Looks, count_pixels, look
from pbe.evaluate.mixture import load_mixture
from pbe.evaluate.paired import paired_means, paired_sets, refuse_other_items
from pbe.evaluate.scale import make_scale
from pbe.evaluate.score import JudgeScale, Method, ScopeScores, ScoreConfig, metric_names, score_method
from pbe.evaluate.views import Region, View, bench_views, edit_views, real_views, square
from pbe.store import (
    File,
    Manifest,
    Record,
    Store,
    code_digest,
    digest,
    load_manifest,
    make_manifest,
    save_manifest,
    write_json,
)
from pipelines.provenance import provenance_tags
from pipelines.stage import Stage, StageError, output_folder
from pipelines.units import Unit, run_units

# What shapes features: a change in what is computed on them must not cost a second look.
LOOK_CODE = (
    "pbe/data/images.py",
    "pbe/data/masks.py",
    "pbe/evaluate/copy_paste.py",
    "pbe/evaluate/extractors.py",
    "pbe/evaluate/look.py",
    "pbe/evaluate/similarity.py",
    "pbe/evaluate/views.py",
    "pbe/model/backbone.py",
    "pbe/model/clip.py",
)
PIXEL_COUNTS = "pixels"  # beside the judges' names
REALS_PER_UNIT = 500
GRID_COLUMNS = 14


@dataclass(frozen=True)
class Look:
    """One unit: what is looked at (bench, reals, edits, or photos of a folder), and by whom."""

    judge: str
    what: str
    file: File | None
    photos: tuple[str, ...] = ()


def main(stage: Stage) -> None:
    cfg = stage.params.evaluate
    bench_manifest = load_manifest(stage.input("bench"))
    bench_file = bench_manifest.files("bench")[0]
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    methods = _methods(stage, bench_file)
    judges: dict[str, Entry] = {judge.kind: keep_judge(stage.store, judge) for judge in cfg.judges}
    looks = _look_at_all(stage, cfg, bench_manifest, methods, judges)

    bench_looks: dict[str, Looks] = {judge: looks.features(judge, "bench") for judge in judges}
    scales: dict[str, JudgeScale] = {judge: _scale(stage, cfg, judge, looks, bench_looks[judge]) for judge in judges}
    photos = dict(zip(*(bench.column(name).to_pylist() for name in ("bench_id", "image_id")), strict=True))
    sizes = ScoreConfig(cfg.resamples, cfg.subsets, cfg.seed)
    scored: dict[str, list[ScopeScores]] = {}
    for name, manifest in methods.items():
        edits = [
            row
            for file in manifest.files("edits")
            for row in stage.store.read_table(
                file, columns=["bench_id", "hole_kind", "reference_kind", "seed"]
            ).to_pylist()
        ]
        seen = {judge: looks.features(judge, name) for judge in judges}
        method = Method(edits, seen, bench_looks, looks.counts(name), photos)
        try:
            scored[name] = score_method(method, scales, sizes)
        except ValueError as error:
            raise StageError(f"evaluate: {name}: {error}") from None
        print(f"evaluate: {name}: {sum(len(scope.scores) for scope in scored[name])} numbers", flush=True)
    paired = _paired(stage, cfg, scored, scales[cfg.judges[0].kind], looks, photos)
    write_json(stage.outputs / "paired.json", paired)
    _write(stage, methods, scored, photos, _card(stage, cfg, bench_manifest, judges, looks), looks.records)


# -- what is scored ------------------------------------------------------------------------------------------------


def _methods(stage: Stage, bench_file: File) -> dict[str, Manifest]:
    """Manifests of the edits, variants first, as params.yaml names them."""
    out = {}
    for folder, names in (("edit", stage.params.variants), ("baseline", stage.params.baselines)):
        for name in names:
            path = output_folder(stage.root, folder, name) / "manifest.json"
            if not path.is_file():
                raise StageError(f"{path}: not there; run `dvc repro {folder}@{name}` first")
            out[name] = load_manifest(path)
            if out[name].config["bench"] != bench_file.sha256:
                raise StageError(f"{path}: edits of another bench; run `dvc repro {folder}@{name}` first")
    return out


def _scale(stage: Stage, cfg: EvaluateConfig, judge: str, looks: "Seen", bench: Looks) -> JudgeScale:
    config = next(found for found in cfg.judges if found.kind == judge)
    path = config.mixture if isinstance(config, ClipJudge) else None
    mixture = load_mixture(repo_root() / Path(path).expanduser()) if path else None
    try:
        return make_scale(
            judge,
            reals=looks.features(judge, "reals").all_of("whole"),
            photos=bench.all_of("source"),
            mixture=mixture,
            upstream_region=_region(cfg, judge) == "upstream",
            components=cfg.quality_components,
            pca_dims=cfg.quality_pca_dims,
            seed=cfg.seed,
        )
    except ValueError as error:
        raise StageError(
            f"evaluate: the untouched photos that {judge} measures by: {error}; lower evaluate.quality_components, or "
            "give more of them (bench.crops_per_box, bench.max_items, evaluate.reals)"
        ) from None


# -- looking -------------------------------------------------------------------------------------------------------


class Seen:
    """Records of the looks, by judge and by what was looked at (bench, reals, or a method's name)."""

    def __init__(self, store: Store, records: Mapping[tuple[str, str], Sequence[Record]]) -> None:
        self._store, self._records = store, records

    def features(self, judge: str, of: str) -> Looks:
        files = [record.file("features") for record in self._records[judge, of]]
        return Looks([require(self._store.read_table(file), FEATURES, file.path) for file in files])

    def counts(self, method: str) -> Counts:
        files = [record.file("pixels") for record in self._records[PIXEL_COUNTS, method]]
        return Counts([require(self._store.read_table(file), PIXELS, file.path) for file in files])

    @property
    def records(self) -> list[Record]:
        return [record for found in self._records.values() for record in found]

    def digest(self, judge: str, of: str) -> str:
        return digest([record.file("features").sha256 for record in self._records[judge, of]])


def _look_at_all(
    stage: Stage, cfg: EvaluateConfig, bench: Manifest, methods: Mapping[str, Manifest], judges: Mapping[str, Entry]
) -> Seen:
    bench_file = bench.files("bench")[0]
    wanted: list[tuple[str, Look]] = []  # of what, and the look
    for judge in judges:
        wanted.append(("bench", Look(judge, "bench", bench_file)))
        wanted += [("reals", at) for at in _looks_at_reals(cfg, judge, bench)]
    for name, manifest in methods.items():
        for judge in (*judges, PIXEL_COUNTS):
            wanted += [(name, Look(judge, "edits", file)) for file in manifest.files("edits")]
    code = code_digest([stage.root / path for path in LOOK_CODE], stage.root)
    scopes = _scopes(stage)
    units = [
        Unit(f"{at.judge}-{number:04d}", _identity(code, at, judges, bench_file, scopes, cfg), at)
        for number, (_, at) in enumerate(wanted)
    ]
    worker = partial(_worker, stage.store, cfg, judges, bench_file, scopes)
    records = run_units("look", units, store=stage.store, worker=worker, cpus=cfg.cpus_per_actor, actors=cfg.actors)
    found: dict[tuple[str, str], list[Record]] = {}
    for (of, at), record in zip(wanted, records, strict=True):
        found.setdefault((at.judge, of), []).append(record)
    return Seen(stage.store, found)


def _scopes(stage: Stage) -> list[tuple[str, str]]:
    return [(hole, reference) for hole in stage.params.edit.holes for reference in stage.params.edit.references]


def _identity(
    code: str,
    at: Look,
    judges: Mapping[str, Entry],
    bench_file: File,
    scopes: Sequence[tuple[str, str]],
    cfg: EvaluateConfig,
) -> str:
    """The content that is looked at, and the weights that at. The bench has a say where holes and references do."""
    of = at.file.sha256 if at.file else [at.photos, cfg.reals_px]
    return digest(
        [
            "look",
            code,
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
    known = [f"{path.resolve()}|{path.stat().st_size}|{path.stat().st_mtime_ns}" for path in files]
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
    opened = {name: open_judge(store, entry) for name, entry in judges.items()}
    bench = {row["bench_id"]: row for row in store.read_table(bench_file).to_pylist()}

    def views(at: Look) -> Any:
        if at.file is None:
            return (_folder_view(known, cfg) for known in at.photos)
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
        table = look(views(at), opened[at.judge], batch_rows=cfg.batch_rows)
        return store.write_unit("look", unit.name, {"features": table}, counts={"rows": table.num_rows})

    return work


def _region(cfg: EvaluateConfig, judge: str) -> Region:
    """Upstream's is of the CLIP score alone."""
    return cfg.clip_region if judge == "clip" else "whole"


def _folder_view(known: str, cfg: EvaluateConfig) -> View:
    path = Path(known.split("|")[0])
    assert cfg.reals_px is not None
    try:
        return View(path.name, "whole", "whole", square(images.decode(path.read_bytes()), cfg.reals_px))
    except (images.ImageError, OSError) as error:
        raise StageError(f"evaluate.reals: {path}: {error}; remove it from the folder") from None


# -- what is compared ----------------------------------------------------------------------------------------------


def _paired(
    stage: Stage,
    cfg: EvaluateConfig,
    scored: Mapping[str, Sequence[ScopeScores]],
    scale: JudgeScale,
    looks: Seen,
    photos: Mapping[str, str],
) -> dict[str, Any]:
    """Every other method against the first variant, on the same items: pixels, and what the first judge says."""
    against = next(iter(stage.params.variants))
    ours = {(scope.hole_kind, scope.reference_kind): scope for scope in scored[against]}
    out: dict[str, Any] = {"against": against, "judge": scale.name, "methods": {}}
    for name, scopes in scored.items():
        out["methods"][name] = {}
        for scope in scopes:
            first = ours.get((scope.hole_kind, scope.reference_kind))
            if first is None:
                continue
            try:
                refuse_other_items(first.bench_ids, scope.bench_ids)
            except ValueError as error:
                out["methods"][name] = {"not_compared": str(error)}
                break
            of_items = [photos[bench_id] for bench_id in scope.bench_ids]
            mine = {score.metric: score.per_item for score in first.scores}
            found = {
                theirs.metric: paired_means(
                    theirs.per_item, value, photos=of_items, resamples=cfg.resamples, seed=cfg.seed
                )
                for theirs in scope.scores
                if theirs.judge in ("", scale.name)
                and theirs.per_item is not None
                and (value := mine.get(theirs.metric)) is not None
            }
            found[metric_names(scale)["frechet"]] = paired_sets(
                scale.frechet,
                looks.features(scale.name, name).of(scope.first_seed_keys, "whole"),
                looks.features(scale.name, against).of(first.first_seed_keys, "whole"),
                photos=of_items,
                resamples=cfg.subsets,
                seed=cfg.seed,
            )
            at = out["methods"][name].setdefault(scope.hole_kind, {})
            at[scope.reference_kind] = {metric: asdict(paired) for metric, paired in found.items()}
    return out


# -- what is written -----------------------------------------------------------------------------------------------


def _card(
    stage: Stage, cfg: EvaluateConfig, bench: Manifest, judges: Mapping[str, Entry], looks: Seen
) -> dict[str, Any]:
    """What every number of this stage was computed with."""
    opened = {name: open_judge(stage.store, entry) for name, entry in judges.items()}
    ingested = load_manifest(stage.input("ingest"))
    return {
        "bench": {**bench.config, "sha256": bench.files("bench")[0].sha256, "items": bench.files("bench")[0].rows},
        "data_digest": ingested.digest,
        "extractors": {
            name: {
                "digest": judge.digest,
                "resize_rule": judge.resize_rule,
                "reference_digest": looks.digest(name, "reals"),
            }
            for name, judge in opened.items()
        },
        "reference": cfg.reals or "untouched crops of the bench's boxes",
        "resampling_seed": cfg.seed,
        "git_commit": provenance_tags(stage.root)["git_commit"],
    }


def _write(
    stage: Stage,
    methods: Mapping[str, Manifest],
    scored: Mapping[str, Sequence[ScopeScores]],
    photos: Mapping[str, str],
    card: Mapping[str, Any],
    looks: Sequence[Record],
) -> None:
    """metrics.json, a part with every item's scores, and the manifest that names it."""
    metrics: dict[str, Any] = {}
    for name, scopes in scored.items():
        metrics[name] = {"protocol": _protocol(methods[name])}
        for scope in scopes:
            numbers = {score.metric: asdict(score.estimate) | {"judge": score.judge} for score in scope.scores}
            metrics[name].setdefault(scope.hole_kind, {})[scope.reference_kind] = numbers
    write_json(stage.outputs / "metrics.json", {**metrics, "card": dict(card)})
    table = pa.Table.from_pylist(_score_rows(scored, photos), schema=SCORES)
    record = stage.store.write_unit_by_content("evaluate", "scores", {"scores": table})
    config = {"edits": {name: manifest.digest for name, manifest in methods.items()}, **card}
    manifest = make_manifest("evaluate", config=config, code=stage.code, units=[record, *looks])
    for name in scored:
        _log(stage, methods[name], scored[name], card)
    save_manifest(stage.outputs / "manifest.json", manifest)


def _protocol(manifest: Manifest) -> dict[str, Any]:
    keys = ("run", "kind", "protocol", "guidance_scale", "steps", "sampler", "seeds")
    return {key: manifest.config[key] for key in keys if key in manifest.config}


def _score_rows(scored: Mapping[str, Sequence[ScopeScores]], photos: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "hole_kind": scope.hole_kind,
            "reference_kind": scope.reference_kind,
            "metric": score.metric,
            "bench_id": bench_id,
            "image_id": photos[bench_id],
            "value": float(value),
        }
        for method, scopes in scored.items()
        for scope in scopes
        for score in scope.scores
        if score.per_item is not None
        for bench_id, value in zip(scope.bench_ids, score.per_item, strict=True)
    ]


def _log(stage: Stage, edits: Manifest, scopes: Sequence[ScopeScores], card: Mapping[str, Any]) -> None:
    """Values to the method's MLflow run (the training run, for a variant); intervals and the card to a child of it."""
    uri, method = tracking_uri(), edits.config["method"]
    tags = {**provenance_tags(stage.root), "variant": method, "bench": card["bench"]["sha256"][:16]}
    tags |= {f"extractor.{name}": value["digest"] for name, value in card["extractors"].items()}
    parent = edits.config.get("mlflow_run_id") or _baseline_run(stage, uri, edits, tags)
    values = {
        f"{scope.hole_kind}/{scope.reference_kind}/{score.metric}": score.estimate
        for scope in scopes
        for score in scope.scores
    }
    track.log_metrics(uri, parent, {name: estimate.value for name, estimate in values.items()}, prefix="eval/")
    track.log_image(uri, parent, _grid(stage, edits), file="edits.png")
    child = track.open_run(
        uri,
        run_id=None,
        name=f"evaluate-{method}",
        params={"evaluate": stage.params.evaluate.model_dump(mode="json"), "edit": _protocol(edits), "card": card},
        tags=tags,
        parent_run_id=parent,
    )
    detail = {name: estimate.value for name, estimate in values.items()}
    for name, estimate in values.items():
        detail |= {f"{name}.low": estimate.low, f"{name}.high": estimate.high, f"{name}.n": float(estimate.n)}
    track.log_metrics(uri, child, detail)
    track.end_run(uri, child)


def _grid(stage: Stage, edits: Manifest) -> np.ndarray:
    """Of the first seed, in holes of the first kind."""
    hole = stage.params.edit.holes[0]
    bench = stage.store.read_table(load_manifest(stage.input("bench")).files("bench")[0]).to_pylist()
    pictures: dict[tuple[str, str], bytes] = {}
    for file in edits.files("edits"):
        for row in stage.store.read_table(file).to_pylist():
            if row["hole_kind"] == hole:
                pictures.setdefault((row["bench_id"], row["reference_kind"]), row["edit"])
    kinds = [kind for kind in stage.params.edit.references if any(found == kind for _, found in pictures)]
    return edit_grid(bench, pictures, hole_kind=hole, reference_kinds=kinds, columns=GRID_COLUMNS)


def _baseline_run(stage: Stage, uri: str, edits: Manifest, tags: Mapping[str, str]) -> str:
    """One MLflow run per baseline and its edits: it has no training run to be a part of."""
    path = f"runs/baseline-{edits.config['method']}-{edits.digest}/mlflow.json"
    known = json.loads(stage.store.read_bytes(path))["run_id"] if stage.store.exists(path) else None
    name = f"baseline-{edits.config['method']}"
    run_id = track.open_run(uri, run_id=known, name=name, params={"baseline": _protocol(edits)}, tags=tags)
    stage.store.write_bytes(path, json.dumps({"run_id": run_id}).encode())
    track.end_run(uri, run_id)
    return run_id
