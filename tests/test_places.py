"""Settings look for files in this workspace and, when DVC runs an experiment elsewhere, in the main repository."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from unittest import mock

import numpy as np
import pytest
from pydantic import BaseModel

from pbe import places
from pbe.config import Params
from pbe.data.boxfiles.photo_names import PhotoNames
from pbe.data.files import file_tree
from pbe.data.schema import BENCH
from pbe.errors import ParamsError, UserError
from pbe.evaluate.bench.cocoee import _labels
from pbe.evaluate.features.weights import _weight_file, store_extractor
from pbe.evaluate.rivals.weights import store_guide, store_rival
from pbe.evaluate.settings import EvaluateConfig, FolderBaseline, HarmoniseBaseline, InpaintBaseline
from pbe.places import local_path, tracking_uri
from pbe.settings import names_path, paths_in
from pbe.store import Store
from pipelines.baseline import _results
from pipelines.bench import _cocoee
from pipelines.encode import _backbone_entry, _codec_entry
from pipelines.features import _extractions_of_real_images, _mixtures
from pipelines.ingest import _selection, open_source, write_index
from pipelines.runtime.stage import Stage
from pipelines.train_weights import initial_weights, score_judge, text_encoder
from tests.profiles import profile

# settings of any text that name nothing on this disk
NO_PATHS = {
    "ingest.image_base",
    "ingest.classes",
    "filter.exclude_images",
    "filter.include_classes",
    "filter.exclude_classes",
    "train.resume_from",
    "train.trainable.lora.targets",
    "evaluate.extractors.sha256",
    "sweep.variant",
    "study.methods",
    "baselines.license",
    "baselines.prompt",
    "baselines.pipeline",
    "baselines.sha256",
}
CLIP = {"kind": "clip", "weights": "w", "mixture": "m"}
NO_MANIFEST = mock.Mock(config={"codec": {"path": ""}})
HERE = "weights/mine"


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The main repository of an experiment that runs in a workspace of its own, with only what git tracks."""
    workspace, main = tmp_path / "main" / ".dvc" / "tmp" / "exps" / "tmp1", tmp_path / "main"
    workspace.mkdir(parents=True)
    monkeypatch.setattr(places, "repo_root", lambda: workspace)
    monkeypatch.setenv("DVC_ROOT", str(main))
    return main


def test_a_file_is_the_workspaces_own_or_else_the_main_repositorys(main: Path) -> None:
    workspace = places.repo_root()
    (main / HERE).mkdir(parents=True)
    assert local_path(HERE) == main / HERE
    (workspace / HERE).mkdir(parents=True)
    (workspace / HERE / ".gitignore").write_text("*")  # all that git tracks of it
    assert local_path(HERE) == main / HERE
    (workspace / HERE / "model.json").write_text("{}")
    assert local_path(HERE) == workspace / HERE
    assert local_path("nowhere") == main / "nowhere"  # what a message should name
    assert local_path("/elsewhere") == Path("/elsewhere")
    with pytest.raises(ParamsError, match=r"^~nobody-of-this-name/x: "):
        local_path("~nobody-of-this-name/x")


@pytest.mark.parametrize("value", ["sqlite:///runs/mlflow.db", "sqlite:///./runs/mlflow.db"])
def test_a_relative_database_is_the_main_repositorys(main: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert tracking_uri() == f"sqlite:///{main}/runs/mlflow.db"


@pytest.mark.parametrize("value", ["mlruns", "./mlruns", "~/mlruns", "sqlite:///~/mlruns"])
def test_other_relative_places_of_mlflow_are_made_absolute_too(
    main: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", str(main))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert tracking_uri().removeprefix("sqlite:///") == str(main / "mlruns")


@pytest.mark.parametrize("value", ["databricks", "databricks://profile", "sqlite:///file:/x/m.db?mode=ro&uri=true"])
def test_what_is_no_relative_path_stays(main: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert tracking_uri() == value


@pytest.mark.parametrize("value", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_database_in_memory_is_refused(main: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    with pytest.raises(ParamsError, match=f"^MLFLOW_TRACKING_URI={value}: SQLite in memory"):
        tracking_uri()


# -- every setting that is a path ------------------------------------------------------------------------------------


def _texts(annotation: Any, key: str, on_disk: bool = False) -> Iterator[tuple[str, bool]]:
    """Every setting below `annotation` that may be any text, and whether it is marked as a path."""
    args, origin = get_args(annotation), get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _texts(field.annotation, f"{key}.{name}".lstrip("."), names_path(*field.metadata))
    elif annotation is str:
        yield key, on_disk
    elif origin is Annotated:
        yield from _texts(args[0], key, on_disk or names_path(*args[1:]))
    elif origin is not Literal:
        for arg in args[1:] if origin is dict else args:
            yield from _texts(arg, key, on_disk)


def _stage(changes: dict[str, Any], section: str) -> Stage:
    """A stage of profile tiny whose `section` has `changes`."""
    params = profile("tiny")
    settings = getattr(params, section)
    changed = type(settings).model_validate(settings.model_dump() | changes)
    return Stage(section, "full", params.model_copy(update={section: changed}), Store("/nowhere"), Path("/nowhere"))


def _evaluate(extractor: dict[str, Any]) -> EvaluateConfig:
    return _stage({"extractors": [extractor]}, "evaluate").params.evaluate


# reads, as its stage does, what each setting names
READERS: dict[str, Callable[[str], object]] = {
    "ingest.images": lambda name: list(
        open_source(_stage({"source": "folder", "images": name}, "ingest").params.ingest).photos()
    ),
    "ingest.boxes": lambda name: write_index(
        Store("/nowhere"), mock.Mock(lists_all=False), _stage({"boxes": name}, "ingest").params.ingest
    ),
    "ingest.image_ids": lambda name: _selection(_stage({"image_ids": name}, "ingest").params.ingest, PhotoNames(None)),
    "encode.codec.weights": lambda name: _codec_entry(
        _stage({"codec": {"kind": "pretrained", "weights": name}}, "encode"), NO_MANIFEST
    ),
    "encode.backbone.weights": lambda name: _backbone_entry(
        _stage({"backbone": {"kind": "clip", "weights": name, "tokens": "class"}}, "encode")
    ),
    "train.init": lambda name: initial_weights(
        stage := _stage({"init": name}, "train"), stage.params.train, NO_MANIFEST
    ),
    "train.text.encoder": lambda name: text_encoder(
        stage := _stage({"text": {"encoder": name}}, "train"), stage.params.train
    ),
    "train.score_extractor.weights": lambda name: score_judge(
        stage := _stage({"score_extractor": {"kind": "clip", "weights": name}}, "train"), stage.params.train
    ),
    "bench.cocoee": lambda name: _cocoee(
        stage := _stage({"source": "cocoee", "cocoee": name}, "bench"), stage.params.bench
    ),
    "bench.cocoee_annotations": lambda name: _labels(file_tree(name, key="bench.cocoee_annotations"), np.array([1])),
    "bench.matcher.weights": lambda name: store_extractor(
        Store("/nowhere"), _stage({"matcher": CLIP | {"weights": name}}, "bench").params.bench.matcher
    ),
    "evaluate.extractors.weights": lambda name: store_extractor(
        Store("/nowhere"), _evaluate(CLIP | {"weights": name}).extractors[0]
    ),
    "evaluate.extractors.mixture": lambda name: _mixtures(_evaluate(CLIP | {"mixture": name})),
    "evaluate.extractors.file": lambda name: store_extractor(
        Store("/nowhere"), _evaluate({"kind": "inception", "file": name, "sha256": "0" * 64}).extractors[0]
    ),
    "evaluate.lpips.backbone": lambda name: _weight_file(name, "backbone").read_bytes(),
    "evaluate.lpips.heads": lambda name: _weight_file(name, "heads").read_bytes(),
    "evaluate.real_images": lambda name: _extractions_of_real_images(
        _stage({"real_images": name, "real_images_px": 64}, "evaluate").params.evaluate, "clip", NO_MANIFEST
    ),
    "baselines.model": lambda name: store_rival(
        Store("/nowhere"), InpaintBaseline(kind="inpaint", model=name, license="none")
    ),
    "baselines.clip": lambda name: store_guide(Store("/nowhere"), name),
    "baselines.file": lambda name: store_rival(
        Store("/nowhere"), HarmoniseBaseline(kind="harmonise", file=name, sha256="0" * 64, license="none")
    ),
    "baselines.folder": lambda name: _results(BENCH.empty_table(), FolderBaseline(kind="folder", folder=name)),
}


def test_every_setting_that_is_a_path_is_marked_as_one_and_read_below() -> None:
    """A new setting of any text must be told apart here: the reader of a path is tried below."""
    texts = dict(_texts(Params, ""))
    assert {key for key, on_disk in texts.items() if not on_disk} == NO_PATHS
    assert {key for key, on_disk in texts.items() if on_disk} == READERS.keys() | {"bench.matcher.mixture"}  # not read


@pytest.mark.parametrize("key", READERS)
def test_a_setting_names_a_file_of_the_main_repository_in_an_experiment_too(main: Path, key: str) -> None:
    with pytest.raises((UserError, OSError)) as error:
        READERS[key](HERE)
    assert str(main / HERE) in str(error.value)


def test_paths_are_listed_by_key() -> None:
    """For `pbe doctor`, and for what a job may not name."""
    extractors = [CLIP, {"kind": "inception", "file": "i.pt", "sha256": "0" * 64}]
    params = _stage({"extractors": extractors}, "evaluate").params
    theirs = FolderBaseline(kind="folder", folder="theirs")
    found = dict(paths_in(params.model_copy(update={"baselines": {"theirs": theirs}})))
    assert found == {
        "ingest.images": params.ingest.images,
        "ingest.boxes": params.ingest.boxes,
        "train.init": "random",
        "evaluate.extractors.0.weights": "w",
        "evaluate.extractors.0.mixture": "m",
        "evaluate.extractors.1.file": "i.pt",
        "baselines.theirs.folder": "theirs",
    }
