"""evaluate: score variants, baselines and results made elsewhere on one bench, as rows of one table."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe import track
from pbe.data.schema import SCORES
from pbe.evaluate.bench.scopes import picture_column
from pbe.evaluate.compare import compare
from pbe.evaluate.grid import edit_grid
from pbe.evaluate.score import ScopeScores, numbers_of, score_method
from pbe.evaluate.settings import ModelBaseline
from pbe.places import tracking_uri
from pbe.store import Manifest, digest, load_manifest, make_manifest, save_manifest, write_json
from pipelines import comparison
from pipelines.features import Extracted, extract_features
from pipelines.model_fills import training_of
from pipelines.reporting.summary import headline_metrics
from pipelines.runtime.provenance import provenance_tags
from pipelines.runtime.stage import Stage, StageError, load_train_manifest, output_folder, training_named
from pipelines.runtime.tracking import after_results, training_run

# raise it when a number changes for the same edits and settings; features have their own (features.py)
VERSION = 3
GRID_COLUMNS = 14


def main(stage: Stage) -> None:
    cfg = stage.params.evaluate
    methods = _methods(stage)
    track.check(tracking_uri())
    started = time.perf_counter()
    extracted = extract_features(stage, {name: manifest.files("edits") for name, manifest in methods.items()})
    features_done = time.perf_counter()
    scored: dict[str, list[ScopeScores]] = {}
    for name in methods:
        try:
            scored[name] = score_method(extracted.method(stage.store, name), extracted.reference_sets, cfg.statistics)
        except ValueError as error:
            raise StageError(f"evaluate: {name}: {error}") from None
        print(f"evaluate: {name}: {sum(len(scope.scores) for scope in scored[name])} numbers", flush=True)
    write_json(stage.outputs / "paired.json", _paired(stage, scored, extracted))
    done = time.perf_counter()
    print(f"evaluate: features {features_done - started:.0f} s, metrics and intervals {done - features_done:.0f} s")
    _write(stage, methods, scored, extracted)


# -- what is scored ------------------------------------------------------------------------------------------------


def _methods(stage: Stage) -> dict[str, Manifest]:
    """Manifests of the edits, variants first, as params.yaml names them."""
    out = {}
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    for folder, names in (("edit", stage.params.variants), ("baseline", stage.params.baselines)):
        for name in names:
            path = output_folder(stage.root, folder, name) / "manifest.json"
            if not path.is_file():
                raise StageError(f"{path}: not there; run `dvc repro {folder}@{name}` first")
            out[name] = load_manifest(path)
            if out[name].config["bench"] != bench_file.sha256:
                raise StageError(f"{path}: edits of another bench; run `dvc repro {folder}@{name}` first")
            if differ := _differences(stage, out[name], name if folder == "edit" else None):
                raise StageError(f"{path}: edits of other settings ({differ}); run `dvc repro {folder}@{name}` first")
            _refuse_earlier_training(stage, name, out[name], path)
            if folder == "edit":
                _refuse_earlier_init(stage, name)
    return out


def _refuse_earlier_training(stage: Stage, name: str, edits: Manifest, path: Path) -> None:
    """Raise StageError for a baseline's edits by a variant that was trained again since, which DVC does not know."""
    baseline = stage.params.baselines.get(name)
    if isinstance(baseline, ModelBaseline):
        for key, value in training_of(stage, baseline).items():
            if edits.config.get(key) != value:
                raise StageError(
                    f"{path}: edits by an earlier training of {baseline.model}; run `dvc repro --force --single-item "
                    f"baseline@{name}` first"
                )


def _refuse_earlier_init(stage: Stage, variant: str) -> None:
    """Raise StageError for a variant that began from another one, which was trained again since."""
    init = stage.params.train_variant(variant).init
    if load_train_manifest(stage, variant).get("init", {}) != training_named(stage, init):
        raise StageError(
            f"train@{variant}: began from an earlier training of {init}; run `dvc repro --force --single-item "
            f"train@{variant}`, then `dvc repro`"
        )


def _differences(stage: Stage, edits: Manifest, variant: str | None) -> str:
    """Describe how the edits' settings differ from params.yaml; rows of one table must share them."""
    asked = stage.params.edit_variant(variant).model_dump(mode="json") if variant else stage.params.edit.asked
    made = {key: edits.config[key] for key in asked if key in edits.config}
    return ", ".join(f"{key} {made[key]}, now {asked[key]}" for key in made if made[key] != asked[key])


# -- what is compared ----------------------------------------------------------------------------------------------


def _paired(stage: Stage, scored: Mapping[str, Sequence[ScopeScores]], extracted: Extracted) -> dict[str, Any]:
    """Compare every method with the first variant on common items: pixel metrics and those of the first extractor."""
    against, extractor = next(iter(stage.params.variants)), stage.params.evaluate.extractors[0].kind
    first_features = extracted.parts.features(extractor, against)
    first = {(scope.hole_kind, scope.reference_kind): scope for scope in scored[against]}
    out: dict[str, Any] = {"against": against, "extractor": extractor, "methods": {}}
    for name, scopes in scored.items():
        out["methods"][name] = {}
        features = extracted.parts.features(extractor, name)
        for scope in scopes:
            # a caption's edits with those of the exemplar that it describes
            other = first.get((scope.hole_kind, picture_column(scope.reference_kind)))
            if other is None:
                continue
            try:
                found = compare(
                    scope,
                    features,
                    other,
                    first_features,
                    reference_set=extracted.reference_sets[extractor],
                    image_ids=extracted.image_ids,
                    cfg=stage.params.evaluate.statistics,
                )
            except ValueError as error:
                out["methods"][name] = {"not_compared": str(error)}
                break
            at = out["methods"][name].setdefault(scope.hole_kind, {})
            at[scope.reference_kind] = {metric: asdict(paired) for metric, paired in found.items()}
    return out


# -- what is written -----------------------------------------------------------------------------------------------


def _write(
    stage: Stage,
    methods: Mapping[str, Manifest],
    scored: Mapping[str, Sequence[ScopeScores]],
    extracted: Extracted,
) -> None:
    """Write metrics.json, a part with every item's scores, and the manifest that names it."""
    metrics: dict[str, Any] = {}
    for name, scopes in scored.items():
        metrics[name] = {"protocol": _protocol(methods[name])}
        for scope in scopes:
            metrics[name].setdefault(scope.hole_kind, {})[scope.reference_kind] = numbers_of(scope)
    card = dict(extracted.card)
    write_json(stage.outputs / "metrics.json", {**metrics, "card": card})
    table = pa.Table.from_pylist(_score_rows(scored, extracted.image_ids), schema=SCORES)
    record = stage.store.write_unit_by_content("evaluate", "scores", {"scores": table})
    config = {"edits": {name: manifest.digest for name, manifest in methods.items()}, **card}
    manifest = make_manifest("evaluate", config=config, version=VERSION, units=[record, *extracted.parts.records])
    save_manifest(stage.outputs / "manifest.json", manifest)
    with after_results(stage):
        items = comparison.compared_items(stage)
        for name in scored:
            _log(stage, methods[name], scored[name], card, items)
        comparison.save_table_view(stage)


def _protocol(manifest: Manifest) -> dict[str, Any]:
    keys = ("run", "kind", "protocol", "guidance_scale", "gradient_scale", "candidates", "steps", "sampler", "seeds")
    protocol = {key: manifest.config[key] for key in keys if key in manifest.config}
    withheld = manifest.counts.get("withheld", 0)
    return protocol | {"withheld": withheld} if withheld else protocol


def _score_rows(scored: Mapping[str, Sequence[ScopeScores]], image_ids: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "hole_kind": scope.hole_kind,
            "reference_kind": scope.reference_kind,
            "metric": score.metric,
            "bench_id": bench_id,
            "image_id": image_ids[bench_id],
            "value": float(value),
        }
        for method, scopes in scored.items()
        for scope in scopes
        for score in scope.scores
        if score.per_item is not None
        for bench_id, value in zip(scope.bench_ids, score.per_item, strict=True)
    ]


def _log(
    stage: Stage,
    edits: Manifest,
    scopes: Sequence[ScopeScores],
    card: Mapping[str, Any],
    items: Mapping[int, Mapping[str, Any]],
) -> None:
    """Log the result table's columns and the edits of some items to the method's MLflow run; all numbers, intervals and
    the card to its child run.

    A variant's run is its training run. Names are short enough for the titles of MLflow's charts.
    """
    uri, method = tracking_uri(), edits.config["method"]
    found_by = {"variant": method, "bench": comparison.bench_tag(stage)}
    tags = {**provenance_tags(stage.root), **found_by}
    tags |= {f"extractor.{name}": value["digest"] for name, value in card["extractors"].items()}
    if "mlflow_run_id" in edits.config:
        run, run_id = edits.config["run"], edits.config["mlflow_run_id"]
        parent = training_run(stage, variant=method, run=run, run_id=run_id)
    else:
        parent = _baseline_run(uri, edits, tags)
    track.set_tags(uri, parent, {**found_by, "part_of": comparison.TABLE})
    values = {
        f"{scope.hole_kind}/{scope.reference_kind}/{score.metric}": score.estimate
        for scope in scopes
        for score in scope.scores
    }
    headline = headline_metrics(stage.params.evaluate.extractors[0].kind)
    columns = {
        f"eval-{scope.hole_kind}/{score.metric}": score.estimate.value
        for scope in scopes
        for score in scope.scores
        if scope.reference_kind == "exemplar" and score.metric in headline
    }
    if edits.config.get("guidance_scale") is not None:  # a pipeline may have its own
        columns["edit/guidance_scale"] = edits.config["guidance_scale"]  # a metric: it may be measured at several
    track.log_metrics(uri, parent, columns)
    track.log_image(uri, parent, _grid(stage, edits), file="edits.png")
    comparison.log_edits(stage, parent, edits.files("edits"), items, key=comparison.edits_key(stage))
    settings = stage.params.evaluate.identity(without={"actors", "per_actor"})
    params = {"evaluate": stage.params.evaluate.model_dump(mode="json"), "edit": _protocol(edits), "card": card}
    child = track.open_run(
        uri,
        name=f"evaluate-{method}",
        identity={"digest": digest(["evaluate", VERSION, edits.digest, settings, card])},
        params=params,
        tags={**tags, "part_of": comparison.DETAIL},
        parent_run_id=parent,
    )
    detail = {name: estimate.value for name, estimate in values.items()}
    for name, estimate in values.items():
        detail |= {f"{name}.low": estimate.low, f"{name}.high": estimate.high, f"{name}.n": float(estimate.n)}
    track.log_metrics(uri, child, detail)
    track.end_run(uri, child)


def _grid(stage: Stage, edits: Manifest) -> np.ndarray:
    """Draw the grid of edits: first seed, first hole kind."""
    hole = stage.params.edit.holes[0]  # others' results use box holes, which params.yaml then lists first
    bench = stage.store.read_table(load_manifest(stage.input("bench")).files("bench")[0]).to_pylist()
    pictures: dict[tuple[str, str], bytes] = {}
    for file in edits.files("edits"):
        for row in stage.store.read_table(file).to_pylist():
            if row["hole_kind"] == hole:
                pictures.setdefault((row["bench_id"], row["reference_kind"]), row["edit"])
    asked = (*stage.params.edit.references, *stage.params.edit.captions)
    kinds = [kind for kind in asked if any(found == kind for _, found in pictures)]
    return edit_grid(bench, pictures, hole_kind=hole, reference_kinds=kinds, columns=GRID_COLUMNS)


def _baseline_run(uri: str, edits: Manifest, tags: Mapping[str, str]) -> str:
    """Return the MLflow run of a baseline and its edits, which has no training run to belong to."""
    name = f"baseline-{edits.config['method']}"
    identity = {"run": f"{name}-{edits.digest}"}
    params = {"baseline": _protocol(edits), "diff": name.replace("-", " ", 1)}
    run_id = track.open_run(uri, name=name, identity=identity, params=params, tags=tags)
    track.end_run(uri, run_id)
    return run_id
