"""What every stage makes of profile tiny, in short, and what it made when golden_parts.json was written.

`python -m tests.pipelines.golden` writes that file, and the defaults of settings, again;
tests/pipelines/test_versions.py compares. The stages run in this process, without Ray, DVC and MLflow, with a model
whose weights are drawn here.

Tables are hashed by their content (schema and values): the bytes of a Parquet file name the version of pyarrow too.
Where torch or Poisson blending computes a value, its last bits differ between processors: of such values a few numbers
are kept (mean, standard deviation, means of 32 equal stretches), and compared with a tolerance.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from pbe.config import Params
from pbe.data import images
from pbe.data.schema import array_value
from pbe.store import Record, Store, load_manifest, write_json
from pipelines.runtime.parts import Unit, Work
from pipelines.runtime.stage import Stage
from tests.profiles import profile

FILE = Path(__file__).with_name("golden_parts.json")
DEFAULTS_FILE = Path(__file__).with_name("golden_defaults.json")
# modules of pipelines/ with a VERSION, in the order they run here, and what each reads
READS = {
    "ingest": (),
    "filter": ("ingest",),
    "materialize": ("ingest", "filter"),
    "encode": ("materialize",),
    "bench": ("ingest", "filter"),
    "edit": ("bench", "encode"),  # encode's codec
    "baseline": ("bench",),
    "features": ("bench", "edit", "baseline"),
    "evaluate": ("features",),
    "sweep": ("features",),
    "study": ("bench",),
}
# settings that decide how a stage runs, not what it makes
HOW_IT_RUNS = (
    "per_", "download", "kernels", "batch_rows", "compile", "max_reject_frac", "retry_rejected", "keep_checkpoints",
    "max_failures", "actors", "score_",
    "input_processes",
)  # fmt: skip
VARIANT, BASELINES = "full", ("copy_paste", "poisson")
# of the standard deviation, or of 1 + a metric's value. Without SIMD instructions values differ by 0.0001, those of
# copy_paste, which searches for the best place, by 0.0025; a guidance scale of 3.03 in place of 3 makes 0.0013
# A retrieval rank is a whole number for each of 8 items: the last bits may swap two exemplars
TOLERANCE, COPY_PASTE_TOLERANCE, RETRIEVAL_TOLERANCE = 0.0005, 0.01, 0.15
STRETCHES = 32

Golden = dict[str, dict[str, Any]]  # module to its version and, by name, hashes and numbers


def version_of(module: str) -> int:
    return importlib.import_module(f"pipelines.{module}").VERSION


def read_golden() -> Golden:
    return json.loads(FILE.read_text())


# -- what the stages make --------------------------------------------------------------------------------------------


def run_stages(root: Path) -> Golden:
    """Run all stages with outputs and storage below `root`."""
    store, params = Store(str(root / "store")), small_params()
    made: dict[str, Any] = {}

    def units(name: str, *variants: str) -> list[Record]:
        found: list[Record] = []
        for variant in variants or (None,):
            stage = Stage(name, variant, params, store, root)
            importlib.import_module(f"pipelines.{name}").main(stage)
            found += load_manifest(stage.outputs / "manifest.json").units
        return found

    with in_this_process(), _nothing_logged():
        for name in ("ingest", "filter", "materialize", "encode", "bench"):
            made[name] = _of_units(store, units(name), inexact=name == "encode")
        _write_model(root, store, params)
        made["edit"] = _of_units(store, units("edit", VARIANT), inexact=True)
        made["baseline"] = {
            f"{name}/{key}": value
            for name in BASELINES
            for key, value in _of_units(store, units("baseline", name), inexact=name == "poisson").items()
        }
        looks = [unit for unit in units("evaluate") if not unit.unit.startswith("scores-")]
        made["features"] = _of_units(store, looks, inexact=True)
        metrics = json.loads((root / "data" / "evaluate" / "metrics.json").read_text())
        made["evaluate"] = _of_metrics({name: metrics[name] for name in BASELINES})
        units("sweep")
        metrics = json.loads((root / "data" / "sweep" / "metrics.json").read_text())
        made["sweep"] = _of_metrics({name: metrics[name] for name in ("scales", "diversity")})
        importlib.import_module("pipelines.study").main(Stage("study", None, params, store, root))
        plan = json.loads((root / "data" / "study" / "plan.json").read_text())  # the edits' digests are of torch
        made["study"] = {"raters": hashlib.sha256(json.dumps(plan["raters"]).encode()).hexdigest()}
    return {module: {"version": version_of(module), "made": made[module]} for module in READS}


def small_params() -> Params:
    """Of profile tiny, with fewer networks and pictures."""
    params = profile("tiny")
    return params.model_copy(
        update={
            "variants": {VARIANT: params.variants[VARIANT]},
            "bench": params.bench.model_copy(update={"max_items": 8}),
            "evaluate": params.evaluate.model_copy(update={"extractors": params.evaluate.extractors[1:]}),
        }
    )


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """No Ray."""
    with contextlib.ExitStack() as stack:
        for module in ("ingest", "materialize", "encode", "bench", "edit"):
            stack.enter_context(mock.patch(f"pipelines.{module}.run_units", _run_units))
        stack.enter_context(mock.patch("pipelines.features.run_groups", _run_groups))
        yield


@contextlib.contextmanager
def _nothing_logged() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("evaluate._log", "sweep._log", "comparison._save_view"):
            stack.enter_context(mock.patch(f"pipelines.{name}"))
        stack.enter_context(mock.patch("pbe.track.check"))
        yield


def _run_units(
    stage: Stage, kind: str, units: Sequence[Unit], *, worker: Callable[[], Callable[[Unit], Record]], **_: Any
) -> list[Record]:
    work = worker()
    return [stage.store.find_unit(kind, unit.name) or work(unit) for unit in units]


def _run_groups(
    stage: Stage, kind: str, groups: Sequence[Sequence[Unit]], *, worker: Callable[[], Work], **_: Any
) -> list[Record]:
    work, found = worker(), []
    for units in groups:
        missing = [unit for unit in units if stage.store.find_unit(kind, unit.name) is None]
        made = dict(zip([unit.name for unit in missing], work(missing) if missing else [], strict=True))
        found += [made.get(unit.name) or stage.store.find_unit(kind, unit.name) for unit in units]
    return [record for record in found if record is not None]


def _write_model(root: Path, store: Store, params: Params) -> None:
    """What train would leave: an export whose weights depend on their names alone, not on how a network is begun."""
    import torch

    from pbe.diffusion.scheduler_config import scheduler_config
    from pbe.model.architecture import architecture_of
    from pbe.model.card import ModelCard
    from pbe.model.unet import new_network
    from pbe.model.weight_store import open_backbone, open_codec
    from pbe.model.weights import Model, save_model

    encoded, cut = load_manifest(root / "data" / "encode" / "manifest.json"), params.materialize
    cfg = params.train_variant(VARIANT)
    network = new_network(architecture_of(cfg.unet, cfg.exemplar, image_px=cut.image_px, encoded=encoded.config)).eval()
    network.load_state_dict(
        {name: torch.from_numpy(_weights(name, tuple(value.shape))) for name, value in network.state_dict().items()}
    )
    card = ModelCard(
        image_px=cut.image_px,
        reference_px=cut.reference_px,
        reference_pad_px=cut.reference_pad_px,
        tokens=cfg.exemplar.tokens,
        scheduler=scheduler_config(cfg.beta_schedule, cfg.objective),
        run={},
    )
    codec, backbone = open_codec(store, encoded.config["codec"]), open_backbone(store, encoded.config["backbone"])
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), Model(network, codec, backbone, card))
        store.copy_tree_in(Path(folder), "runs/golden/export")
    names = store.list_files("runs/golden/export")
    export = {name: hashlib.sha256(store.read_bytes(f"runs/golden/export/{name}")).hexdigest() for name in names}
    trained = {"run": "golden", "export": export, "mlflow_run_id": ""}
    write_json(root / "data" / "train" / VARIANT / "manifest.json", trained)


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        drawn /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".weight"):
        drawn = 1 + 0.1 * drawn
    else:
        drawn *= 0.1
    return drawn.astype(np.float32)


# -- in short --------------------------------------------------------------------------------------------------------


def _of_units(store: Store, units: Iterable[Record], *, inexact: bool) -> dict[str, Any]:
    """A hash of each dataset over all units; if `inexact`, of its other columns and, over all datasets, numbers of each
    column of computed values.
    """
    tables: dict[str, list[pa.Table]] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for unit in units:
        for file in unit.files:
            table = store.read_table(file)
            for field in table.schema if inexact else ():
                values = _computed(field, table.column(field.name).to_pylist())
                if values:
                    columns.setdefault(field.name, []).extend(values)
                    table = table.drop_columns(field.name)
            tables.setdefault(file.dataset, []).append(table)
    hashes = {name: _content_hash(found) for name, found in sorted(tables.items())}
    return hashes | {name: _numbers(np.concatenate(found)) for name, found in sorted(columns.items())}


def _computed(field: pa.Field, column: Sequence[Any]) -> list[np.ndarray]:
    """The values of a column of arrays, edits, features or counts of pixels; none of another column."""
    if field.metadata and b"shape" in field.metadata:
        return [array_value(field, value).ravel() for value in column]
    if field.name == "edit":
        return [images.decode(value).ravel() for value in column]
    if field.name == "vector":
        return [np.frombuffer(value, "<f4") for value in column]
    return [np.array([value]) for value in column] if field.type == pa.float64() else []


def _content_hash(tables: Iterable[pa.Table]) -> str:
    sha256 = hashlib.sha256()
    for table in tables:
        schema = [(field.name, str(field.type), field.nullable, field.metadata) for field in table.schema]
        sha256.update(repr((schema, table.to_pydict())).encode())
    return sha256.hexdigest()[:16]


def _numbers(values: np.ndarray) -> list[float]:
    values = np.clip(values.astype(np.float64), -1e4, 1e4)  # the PSNR of equal pictures has no end
    stretches = [stretch.mean() for stretch in np.array_split(values, STRETCHES)]
    return [float(f"{value:.5g}") for value in (values.mean(), values.std(), *stretches)]


def _of_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Every `value` of it, by where it stands."""

    def values(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        for key, inner in node.items() if isinstance(node, dict) else ():
            if key == "value":
                yield path, [float(f"{inner:.5g}")]
            else:
                yield from values(inner, f"{path}/{key}" if path else key)

    return dict(sorted(values(metrics, "")))


# -- what differs ----------------------------------------------------------------------------------------------------


def differences(found: Golden, golden: Golden, module: str) -> list[str]:
    """Names of what `module` makes that are not as they were."""
    made, known = (tree.get(module, {}).get("made", {}) for tree in (found, golden))
    return [name for name in sorted({*made, *known}) if not _equal(name, made.get(name), known.get(name))]


def _equal(name: str, found: Any, known: Any) -> bool:
    if not (isinstance(found, list) and isinstance(known, list) and len(found) == len(known)):
        return found == known
    size = known[1] if len(known) > 1 else 1 + abs(known[0])
    tolerance = COPY_PASTE_TOLERANCE if name.endswith("copy_paste") else TOLERANCE
    allowed = size * (RETRIEVAL_TOLERANCE if "/retrieval_" in name else tolerance)
    return all(abs(one - other) <= allowed for one, other in zip(found, known, strict=True))


def read_by(module: str) -> set[str]:
    """Modules whose parts it reads, directly or not."""
    return {name for read in READS[module] for name in (read, *read_by(read))}


def verdict(found: Golden, golden: Golden, module: str) -> str:
    """What to do about what `module` makes; empty when it is as it was, or follows from a change before it."""
    changed = differences(found, golden, module)
    inputs_changed = any(differences(found, golden, name) for name in read_by(module))
    if module not in golden or found[module]["version"] != golden[module]["version"]:
        return f"VERSION of pipelines/{module}.py is new: `python -m tests.pipelines.golden` writes down what it makes"
    if changed and not inputs_changed:
        return (
            f"pipelines/{module}.py makes other parts of the same input ({', '.join(changed[:4])}): if that is meant, "
            "raise VERSION there, then `python -m tests.pipelines.golden`. If only settings of profile tiny "
            "have changed, `python -m tests.pipelines.golden --settings`"
        )
    return ""


# -- defaults --------------------------------------------------------------------------------------------------------


def defaults() -> Golden:
    """By stage: its VERSION, and the defaults of settings that decide what it makes and that params.yaml need not
    name."""
    out: Golden = {}
    for stage, field in Params.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out[stage] = {"version": version_of(stage), "defaults": dict(_defaults_of(field.annotation, ""))}
    return out


def _defaults_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel) and not name.startswith(HOW_IT_RUNS):
            yield from _defaults_of(type(field.default), f"{prefix}{name}.")
        elif not field.is_required() and not (prefix + name).startswith(HOW_IT_RUNS):
            yield prefix + name, field.default


def defaults_verdict(found: Golden, golden: Golden, stage: str) -> str:
    """What to do about a changed default; empty when there is none."""
    now, before = json.loads(json.dumps(found[stage])), golden.get(stage, {})
    if now == before:
        return ""
    known = before.get("defaults", {})  # a key that is new or gone renames no part
    changed = [key for key in now["defaults"].keys() & known.keys() if now["defaults"][key] != known[key]]
    if changed and now["version"] == before.get("version"):
        return (
            f"{stage}: another default of {', '.join(changed)}: DVC, which reads params.yaml alone, would not run the "
            f"stage; raise VERSION of pipelines/{stage}.py, then `python -m tests.pipelines.golden`"
        )
    return f"{stage}: its VERSION, or which settings have a default: `python -m tests.pipelines.golden` writes it down"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.golden", description=__doc__)
    parser.add_argument("--settings", action="store_true", help="settings of profile tiny have changed, not the code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_stages(Path(folder))
    golden = read_golden() if FILE.is_file() else {}
    problems = [told for module in READS if "raise VERSION" in (told := verdict(found, golden, module))]
    known = json.loads(DEFAULTS_FILE.read_text()) if DEFAULTS_FILE.is_file() else {}
    problems += [told for stage in known if "raise VERSION" in (told := defaults_verdict(defaults(), known, stage))]
    if problems and not args.settings:
        sys.exit("\n".join(problems))
    FILE.write_text(_one_line_each(found))
    DEFAULTS_FILE.write_text(json.dumps(defaults(), indent=1) + "\n")


def _one_line_each(golden: Golden) -> str:
    modules = []
    for module, entry in golden.items():
        made = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entry["made"].items())
        modules.append(f'{json.dumps(module)}: {{"version": {entry["version"]}, "made": {{\n{made}}}}}')
    return "{\n" + ",\n".join(modules) + "\n}\n"


if __name__ == "__main__":
    main()
