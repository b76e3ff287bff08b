"""Runs side by side in MLflow: the same items under the same key and step, what differs, and a page that shows them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe import track
from pbe.config import VariantConfig
from pbe.data import images
from pbe.data.masks import pack_mask
from pbe.data.schema import BENCH, EDITS
from pbe.store import File, Record, Store, make_manifest, save_manifest
from pbe.train.checkpoints import Run
from pipelines import comparison, train
from pipelines.cluster.working_dir import job_env
from pipelines.commands.profile import full_text
from pipelines.runtime.differences import BASELINE_VARIABLE, DIFF_VARIABLE, differences
from pipelines.runtime.provenance import EXPERIMENT_VARIABLE
from pipelines.runtime.stage import Stage
from tests.mlflow_server import mlflow_server
from tests.pipelines import golden
from tests.profiles import FOLDER

ITEMS, SIDE_PX = 30, 64
WITH_HOLE = [number for number in range(ITEMS) if number % 3 != 1]
KEY = "eval-bezier/edits"
GREY = {"full": 40, "baseline": 120, "copy_paste": 220}  # of a method's edits
VARIANTS = {
    "full": VariantConfig(),
    "baseline": VariantConfig.model_validate(
        {"train": {"condition_dropout_prob": 0.0, "exemplar": {"tokens": "all"}}, "edit": {"guidance_scale": 1.0}}
    ),
}


@pytest.fixture(autouse=True)
def no_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BASELINE_VARIABLE, DIFF_VARIABLE, EXPERIMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _stage(root: Path, name: str = "evaluate", variant: str | None = None) -> Stage:
    params = golden.small_params()
    edit = params.edit.model_copy(update={"holes": ("bezier", "box")})
    changed = params.model_copy(update={"variants": VARIANTS, "edit": edit})
    return Stage(name, variant, changed, Store(str(root / "store")), root)


def _flat(grey: int) -> bytes:
    return images.encode_png(np.full((SIDE_PX, SIDE_PX, 3), grey, np.uint8))


def _bench(stage: Stage) -> None:
    """Of every three items, one has no hole of the first kind."""
    hole = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    hole[16:48, 16:48] = 1
    rows = [
        {
            "bench_id": f"item{number:02d}",
            "image_id": f"photo{number:02d}",
            "label_name": "Cat",
            "source": _flat(100 + number),
            "box_hole_mask": pack_mask(hole),
            "bezier_hole_mask": pack_mask(hole) if number in WITH_HOLE else None,
            "exemplar": _flat(30),
            "exemplar_image_id": "other",
            "exemplar_same_class": True,
            "own": _flat(30),
            "foreign": _flat(30),
        }
        for number in range(ITEMS)
    ]
    schema = pa.schema([field for field in BENCH if field.name in rows[0]])
    record = stage.store.write_unit_by_content("bench", "bench", {"bench": pa.Table.from_pylist(rows, schema)})
    manifest = make_manifest("bench", config={}, version=1, units=[record])
    stage.input("bench").parent.mkdir(parents=True, exist_ok=True)
    save_manifest(stage.input("bench"), manifest)


def _edits(stage: Stage, method: str, *, grey: int, kind: str = "exemplar", but: str = "") -> list[File]:
    """Two parts, in which edits of other references and holes come first; `but` has no edit."""
    files = []
    for numbers in (WITH_HOLE[:9], WITH_HOLE[9:]):
        rows = [
            {"bench_id": name, "hole_kind": hole, "reference_kind": reference, "seed": 1, "edit": _flat(shown)}
            for name in (f"item{number:02d}" for number in numbers)
            for hole, reference, shown in (("bezier", "own", 1), ("box", kind, 2), ("bezier", kind, grey))
            if name != but
        ]
        table = pa.Table.from_pylist(rows, EDITS)
        files.append(stage.store.write_unit_by_content("edit", method, {"edits": table}).file("edits"))
    return files


def _run(uri: str, stage: Stage, method: str) -> str:
    tags = {"variant": method, "bench": comparison.bench_tag(stage), "part_of": comparison.TABLE}
    name = method if method in VARIANTS else f"baseline-{method}"
    run = track.open_run(uri, name=name, identity={"run": name}, params={"train": {"lr": GREY[method]}}, tags=tags)
    track.log_metrics(uri, run, {"eval-bezier/gain": GREY[method] / 1000})
    return run


def _shown(uri: str, run: str) -> dict[int, str]:
    """Full-size image of each step, of which there must be one, with one thumbnail."""
    files = [file.path for file in _client(uri).list_artifacts(run, "images") if track._series_of(file.path)[0] == KEY]
    steps = [track._series_of(path)[1] for path in files]
    assert all(steps.count(step) == 2 for step in steps)
    return {int(step): path for step, path in zip(steps, files, strict=True) if step is not None and ".png" in path}


def _edit_grey(uri: str, run: str, step: int, folder: Path) -> int:
    path = _client(uri).download_artifacts(run, _shown(uri, run)[step], str(folder))
    picture = images.decode(Path(path).read_bytes())
    assert picture.shape == (192, 256, 3)
    photo, holed, exemplar = (picture[top : top + 64, :64] for top in (0, 64, 128))
    assert (photo == 100 + step).all() and holed[32, 32, 0] == 128 and holed[2, 2, 0] == 100 + step
    assert (exemplar == 30).all()
    return int(picture[100, 200, 0])


# -- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_methods_share_keys_and_steps_and_an_edit_is_logged_once(mlflow_uri: str, tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    _bench(stage)
    items = comparison.compared_items(stage)
    assert len(items) == comparison.ITEMS and set(items) <= set(WITH_HOLE)
    assert (min(items), max(items)) == (WITH_HOLE[0], WITH_HOLE[-1])
    assert all(item["bench_id"] == f"item{place:02d}" for place, item in items.items())
    few = comparison.compared_items(stage, edited={f"item{number:02d}" for number in range(5)})
    assert list(few) == [0, 2, 3] and comparison.edits_key(stage) == KEY

    runs = {method: _run(mlflow_uri, stage, method) for method in GREY}
    # a text variant has captions of the exemplar; a folder of results may lack an item
    asked = {"full": {}, "baseline": {"kind": "label"}, "copy_paste": {"but": f"item{max(items):02d}"}}
    for _ in range(2):
        for method, run in runs.items():
            edits = _edits(stage, method, grey=GREY[method], **asked[method])
            comparison.log_edits(stage, run, edits, items, key=KEY)
    shown = {method: _shown(mlflow_uri, run) for method, run in runs.items()}
    assert set(shown["full"]) == set(shown["baseline"]) == set(items)
    assert set(items) - set(shown["copy_paste"]) == {max(items)}
    for method, run in runs.items():
        assert _edit_grey(mlflow_uri, run, min(items), tmp_path) == GREY[method]

    # another training grid stays, other edits replace these
    track.log_image_at(mlflow_uri, runs["full"], np.zeros((8, 8, 3), np.uint8), key=track.GRIDS, step=7)
    comparison.log_edits(stage, runs["full"], _edits(stage, "full", grey=77), few, key=KEY)
    assert set(_shown(mlflow_uri, runs["full"])) == set(few)
    assert _edit_grey(mlflow_uri, runs["full"], 2, tmp_path) == 77
    files = [file.path for file in _client(mlflow_uri).list_artifacts(runs["full"], "images")]
    assert sum(track._series_of(path) == (track.GRIDS, 7) for path in files) == 2


# -- settings --------------------------------------------------------------------------------------------------------


def _params_of(uri: str, stage: Stage) -> dict[str, str]:
    assert stage.variant is not None
    encoded = make_manifest("encode", config={}, version=1, units=[Record("e0000", (), {"rows": 1})])
    run = Run(stage.store, f"{stage.variant}-0123")
    cfg = stage.params.train_variant(stage.variant)
    run_id = train._open_mlflow_run(stage, cfg, encoded, run, "0123", None)
    params: dict[str, str] = _client(uri).get_run(run_id).data.params
    return {key: value for key, value in params.items() if key.split(".")[0] == "diff"}


def test_a_run_says_what_its_variant_has_otherwise(mlflow_uri: str, tmp_path: Path) -> None:
    assert _params_of(mlflow_uri, _stage(tmp_path, "train", "full")) == {"diff": "nothing"}
    assert _params_of(mlflow_uri, _stage(tmp_path, "train", "baseline")) == {
        "diff": "train.condition_dropout_prob=0.0, train.exemplar.tokens=all, edit.guidance_scale=1.0",
        "diff.edit.guidance_scale": "1.0",
        "diff.train.condition_dropout_prob": "0.0",
        "diff.train.exemplar.tokens": "all",
    }


def test_an_experiment_is_compared_with_the_params_yaml_it_began_from_also_in_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = _stage(tmp_path, "train", "baseline")
    of_variant = differences(stage)

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    text = full_text(FOLDER, "tiny")
    assert text.count("lr: ") == 1
    (tmp_path / "params.yaml").write_text(text.replace("  lr: ", "  lr: 0.5 # "))
    git("add", "params.yaml")
    git("commit", "-qm", "params")
    monkeypatch.setenv(BASELINE_VARIABLE, git("rev-parse", "HEAD").strip())
    monkeypatch.setenv(EXPERIMENT_VARIABLE, "plush-hare")
    found = differences(stage)
    assert found == {"train.lr": str(stage.params.train.lr), **of_variant}
    sent = job_env(stage, "job-1")
    monkeypatch.delenv(BASELINE_VARIABLE)
    monkeypatch.setenv(DIFF_VARIABLE, sent[DIFF_VARIABLE])
    assert differences(stage) == found and sent[EXPERIMENT_VARIABLE] == "plush-hare"

    monkeypatch.delenv(DIFF_VARIABLE)
    monkeypatch.setenv(BASELINE_VARIABLE, "0" * 40)
    assert differences(stage) == of_variant
    assert capsys.readouterr().out.startswith("train@baseline: diff.* compares with params.yaml as it is")


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_saved_view_shows_the_edits_of_all_runs_side_by_side(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The view's format is MLflow's own, and documented nowhere: another version may read it otherwise."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on PATH")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; install pbe[dev]")
    shutil.copy(mlflow_database, tmp_path / "server.db")
    uri = f"sqlite:///{tmp_path / 'server.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    stage = _stage(tmp_path)
    _bench(stage)
    items = dict(sorted(comparison.compared_items(stage).items())[:2])
    runs = {method: _run(uri, stage, method) for method in GREY}
    for method, run in runs.items():
        comparison.log_edits(stage, run, _edits(stage, method, grey=GREY[method]), items, key=KEY)
    tags = {"bench": comparison.bench_tag(stage), "part_of": comparison.DETAIL}
    track.open_run(uri, name="evaluate", identity={"digest": "0"}, params={}, tags=tags, parent_run_id=runs["full"])
    comparison.save_table_view(stage)
    address = capsys.readouterr().out.rpartition(" in MLflow: ")[2].strip()
    with mlflow_server(tmp_path) as server, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1200})
        page.goto(address.replace("http://127.0.0.1:5000", server.uri))
        for place in items:
            if place:
                page.get_by_role("slider").press("ArrowRight")
            for run in runs.values():
                picture = page.locator(f"img[src*='{run}'][src*='step%2B{place}%2B']")
                picture.wait_for(timeout=90_000)
                assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
        assert page.get_by_text("3 matching runs").is_visible()  # without the child
        page.get_by_text("train.lr", exact=True).first.wait_for(timeout=30_000)  # which differs
        browser.close()
