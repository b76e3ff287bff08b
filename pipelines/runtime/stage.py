"""A stage, opened: parameters, storage, and the paths of its inputs and outputs."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pbe.config import Params, load_params
from pbe.errors import ParamsError, UserError
from pbe.evaluate.settings import RivalBaseline
from pbe.places import repo_root, storage_uri
from pbe.store import Store, digest, write_json

DATA_STAGES = ("ingest", "filter", "materialize", "encode")
VARIANT_STAGES = ("train", "edit")  # once per variant
STAGES = (*DATA_STAGES, "train", "bench", "edit", "baseline", "evaluate", "sweep", "study", "report")
# run on the cluster if RAY_ADDRESS names one; the others are light and run where dvc.lock is
CLUSTER_STAGES = ("ingest", "materialize", "encode", "train", "bench", "edit", "evaluate", "sweep")
# modules with their own VERSION whose parts the stage also makes
MAKES_PARTS_OF = {"evaluate": ("features",), "sweep": ("edit", "features")}


class StageError(UserError):
    """A stage cannot continue; the message says why and what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, opened. variant: the variant it runs for; of the baseline stage, a
    baseline.
    """

    name: str
    variant: str | None
    params: Params
    store: Store
    root: Path

    @property
    def title(self) -> str:
        """The stage's name for `dvc repro`, such as train@full."""
        return f"{self.name}@{self.variant}" if self.variant else self.name

    @property
    def is_heavy(self) -> bool:
        """Whether it runs on the cluster if there is one. Reading COCOEE, a folder of this machine, is light, and so is
        a baseline without a model."""
        if self.name == "baseline" and self.variant is not None:
            return isinstance(self.params.baselines[self.variant], RivalBaseline)
        return self.name in CLUSTER_STAGES and (self.name != "bench" or self.params.bench.source == "heldout")

    @property
    def outputs(self) -> Path:
        """Folder of the small output files that DVC tracks: manifest.json, counts.json, metrics.json."""
        return output_folder(self.root, self.name, self.variant)

    def input(self, stage: str) -> Path:
        """Return the path of another stage's manifest (for the same variant)."""
        return output_folder(self.root, stage, self.variant if stage in VARIANT_STAGES else None) / "manifest.json"


def output_folder(root: Path, stage: str, variant: str | None = None) -> Path:
    """Return a stage's output folder. Baselines lie beside the variants' edits: evaluate reads both alike."""
    folder = root / "data" / ("edit" if stage == "baseline" else stage)
    return folder / variant if variant else folder


def load_train_manifest(stage: Stage, variant: str) -> dict[str, Any]:
    """Read the manifest of train@variant: run name, digest, MLflow run, hashes of the export."""
    path = output_folder(stage.root, "train", variant) / "manifest.json"
    if not path.is_file():
        raise StageError(f"{path}: not there; run `dvc repro train@{variant}` first")
    return json.loads(path.read_text())


def training_named(stage: Stage, model: str) -> dict[str, str]:
    """Return what names the training that a model came from, if it is a variant's: models/<variant>.

    dvc.yaml cannot have this dependency, which few settings have; evaluate compares it. Raises StageError.
    """
    folder = PurePosixPath(model)
    if folder.parent != PurePosixPath("models") or folder.name not in stage.params.variants:
        return {}
    return {"variant": folder.name, "export": digest(load_train_manifest(stage, folder.name)["export"])}


def open_stage(name: str, variant: str | None = None) -> Stage:
    """Open a stage. Raises ParamsError when params.yaml or the variant is invalid."""
    params = load_params()
    if name in VARIANT_STAGES:
        if variant is None:
            raise ParamsError(f"stage {name} needs --variant; params.yaml names: {', '.join(params.variants)}")
        params.train_variant(variant)
    if name == "baseline" and variant not in params.baselines:
        raise ParamsError(f"baseline '{variant}' is not in params.yaml; it names: {', '.join(params.baselines)}")
    return Stage(name, variant, params, Store(storage_uri()), repo_root())


def versions(stage: str) -> list[int]:
    """Return every VERSION that names the stage's parts: its own, then those of modules whose parts it makes too."""
    modules = (stage, *MAKES_PARTS_OF.get(stage, ()))
    return [importlib.import_module(f"pipelines.{module}").VERSION for module in modules]


def save_counts(stage: Stage, counts: dict[str, int]) -> None:
    """Write counts.json, a DVC metric: rows in, kept, and dropped by reason. Print those that are not 0."""
    write_json(stage.outputs / "counts.json", dict(sorted(counts.items())))
    print(f"{stage.name}: " + ", ".join(f"{key} {value}" for key, value in counts.items() if value))
