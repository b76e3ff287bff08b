"""Baselines with a model as a stage: what is asked of the bench, what is stored, what is left out."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from pbe.config import Params, VariantConfig, parse_params
from pbe.data import images
from pbe.data.masks import pack_mask
from pbe.data.schema import BENCH
from pbe.errors import ParamsError, UserError
from pbe.evaluate.settings import FilledBaseline, HarmoniseBaseline, InpaintBaseline
from pbe.store import Manifest, Store, load_manifest, make_manifest, save_manifest, write_json
from pipelines import baseline, evaluate
from pipelines.cluster.working_dir import entrypoint, refuse_what_cannot_travel
from pipelines.commands.profile import full_text
from pipelines.model_fills import training_of
from pipelines.runtime.stage import Stage, StageError, output_folder, training_named
from tests.pipelines import golden
from tests.profiles import FOLDER, profile
from tests.tiny_weights import IMAGE_PX, write_harmoniser, write_inpainting

ITEMS = 4


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with mock.patch("pipelines.model_fills.run_units", golden._run_units):
        yield


def make_stage(root: Path, model: Path | str, *, label_name: str = "dog", **settings: Any) -> Stage:
    """A bench of four items with an exemplar and a foreign reference each, and an inpainting baseline named sd."""
    params, store = profile("tiny"), Store(str(root / "store"))
    values = {"kind": "inpaint", "model": str(model), "license": "none", "steps": 2, "items_per_unit": 3, **settings}
    edit = params.edit.model_copy(update={"holes": ("box",), "references": ("exemplar", "foreign"), "seeds": (1, 2)})
    changed = {"baselines": {"sd": InpaintBaseline.model_validate(values)}, "edit": edit}
    stage = Stage("baseline", "sd", Params.model_validate(params.model_copy(update=changed).model_dump()), store, root)
    rng = np.random.default_rng(1)
    hole = np.zeros((IMAGE_PX, IMAGE_PX), np.uint8)
    hole[8:24, 4:20] = 1
    rows = []
    for number in range(ITEMS):
        source, exemplar, foreign = rng.integers(0, 256, (3, IMAGE_PX, IMAGE_PX, 3)).astype(np.uint8)
        rows.append(
            {
                "bench_id": f"item{number}",
                "image_id": f"photo{number}",
                "label_name": label_name if number else "cat",
                "source": images.encode_png(source),
                "box_hole_mask": pack_mask(hole),
                "exemplar": images.encode_png(exemplar),
                "exemplar_image_id": "other",
                "foreign": images.encode_png(foreign),
            }
        )
    record = store.write_unit_by_content("bench", "bench", {"bench": pa.Table.from_pylist(rows, schema=BENCH)})
    save_manifest(stage.input("bench"), make_manifest("bench", config={}, version=1, units=[record]))
    return stage


def made(stage: Stage) -> Manifest:
    baseline.main(stage)
    return load_manifest(stage.outputs / "manifest.json")


def rows_of(stage: Stage, manifest: Manifest) -> list[dict[str, Any]]:
    return [row for file in manifest.files("edits") for row in stage.store.read_table(file).to_pylist()]


def test_edits_are_stored_once_and_are_rows_of_the_table(tmp_path: Path) -> None:
    """A text says nothing of the reference: one fill serves all references. Where the weights lie, what their licence
    is and how work is spread names no part."""
    stage = make_stage(tmp_path, write_inpainting(tmp_path / "model"))
    manifest = made(stage)
    rows = rows_of(stage, manifest)
    assert manifest.counts == {"items": ITEMS, "edits": 4 * ITEMS, "withheld": 0, "items_left_out": 0}
    fills = {(row["bench_id"], row["seed"]): row["edit"] for row in rows if row["reference_kind"] == "exemplar"}
    assert len(fills) == len(set(fills.values())) == 2 * ITEMS
    assert all(row["edit"] == fills[row["bench_id"], row["seed"]] for row in rows)
    assert evaluate._differences(stage, manifest, None) == ""

    (tmp_path / "model").rename(tmp_path / "moved")
    again = make_stage(tmp_path, tmp_path / "moved", license="OpenRAIL", actors=2)
    assert made(again).units == manifest.units
    assert made(make_stage(tmp_path, tmp_path / "moved", steps=3)).digest != manifest.digest


def test_a_network_of_a_file_draws_no_noise_and_is_named_by_its_content(tmp_path: Path) -> None:
    """One edit of every reference, whatever the seeds."""
    stage = make_stage(tmp_path, "unused")

    def harmonised(file: Path, **changes: Any) -> Stage:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        values = {"kind": "harmonise", "file": str(file), "sha256": sha256, "license": "none", **changes}
        params = stage.params.model_copy(update={"baselines": {"sd": HarmoniseBaseline.model_validate(values)}})
        return Stage("baseline", "sd", params, stage.store, stage.root)

    manifest = made(harmonised(write_harmoniser(tmp_path / "network.pt")))
    rows = rows_of(stage, manifest)
    assert manifest.counts["edits"] == len(rows) == 2 * ITEMS and {row["seed"] for row in rows} == {0}
    assert len({row["edit"] for row in rows}) == len(rows)  # the reference matters
    assert evaluate._differences(stage, manifest, None) == "" and harmonised(tmp_path / "network.pt").is_heavy
    (tmp_path / "network.pt").rename(tmp_path / "moved.pt")
    assert made(harmonised(tmp_path / "moved.pt", license="MIT")).units == manifest.units
    assert made(harmonised(write_harmoniser(tmp_path / "other.pt", seed=1))).digest != manifest.digest


def test_an_item_of_which_a_fill_is_withheld_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its other seeds and references too: a score needs all. The checker's cosines, by item and seed, are 0.414 and
    0.403, 0.355 and 0.398, 0.384 and 0.389, 0.342 and 0.382."""
    stage = make_stage(tmp_path, write_inpainting(tmp_path / "model", withholds_above=0.394))
    manifest = made(stage)
    assert manifest.counts == {"items": ITEMS, "edits": 8, "withheld": 3, "items_left_out": 2}
    assert {row["bench_id"] for row in rows_of(stage, manifest)} == {"item2", "item3"}
    assert "baseline: sd: its safety checker withheld 3 edits; their 2 items are left out" in capsys.readouterr().out
    assert evaluate._protocol(manifest)["withheld"] == 3


def test_when_every_edit_is_withheld_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^baselines\.sd\.model: its safety checker withheld every edit; name"):
        made(make_stage(tmp_path, write_inpainting(tmp_path / "model", withholds_above=-1.1)))


def test_an_item_without_class_is_named_where_the_prompt_needs_one(tmp_path: Path) -> None:
    model = write_inpainting(tmp_path / "model")
    message = r"^baselines\.sd\.prompt: 3 of 4 bench items have no class for \{label_name\}, such as item1; write"
    with pytest.raises(StageError, match=message):
        made(make_stage(tmp_path, model, label_name=""))
    assert made(make_stage(tmp_path, model, label_name="", prompt="a photo")).counts["edits"] == 4 * ITEMS


@pytest.mark.parametrize("prompt", ["{label}", "{}", "{label_name!r}", "{label_name:>9}", "{label_name"])
def test_a_prompt_that_names_anything_else_is_refused(prompt: str) -> None:
    row = f'sd: {{kind: inpaint, model: m, license: l, prompt: "{prompt}"}}'
    text = full_text(FOLDER, "tiny").replace("copy_paste: {kind: copy_paste}", row)
    with pytest.raises(ParamsError, match=r"baselines\.sd\.prompt: '.*' ?(is no prompt|: a prompt may name)") as error:
        parse_params(text, "params.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", r"^nowhere: no such folder \(.*; a model on the hub is written org/name@revision"),
        ("{root}", r": no weights in subfolders, as a whole model has them"),
        ("{root}/only-a-vae", r"only-a-vae: no model_index.json in it"),
    ],
)
def test_weights_that_are_not_there_or_not_whole_are_one_line(tmp_path: Path, model: str, message: str) -> None:
    write_inpainting(tmp_path / "model")
    (tmp_path / "only-a-vae").mkdir()
    (tmp_path / "model" / "vae").rename(tmp_path / "only-a-vae" / "vae")
    with pytest.raises(UserError, match=message) as error:
        made(make_stage(tmp_path, model.format(root=tmp_path)))
    assert "\n" not in str(error.value)


def test_it_runs_on_the_cluster_and_a_folder_of_this_machine_does_not_travel(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, "weights/sd")
    assert stage.is_heavy and entrypoint(stage, "j1") == "python -m pipelines baseline --baseline sd --as-job j1"
    with pytest.raises(StageError, match=r"baselines\.sd\.model = weights/sd does not travel with a job"):
        refuse_what_cannot_travel(stage, "http://127.0.0.1:8265")
    light = stage.params.model_copy(update={"baselines": {"sd": FilledBaseline(kind="poisson")}})
    assert not Stage("baseline", "sd", light, stage.store, tmp_path).is_heavy


def test_edits_by_an_earlier_training_of_a_variant_are_refused(tmp_path: Path) -> None:
    """DVC does not know that such a row depends on the training."""
    stage = make_stage(tmp_path, "models/full")
    baseline = stage.params.baselines["sd"]
    assert isinstance(baseline, InpaintBaseline)
    with pytest.raises(StageError, match=r"run `dvc repro train@full` first"):
        training_of(stage, baseline)
    trained = output_folder(tmp_path, "train", "full") / "manifest.json"
    write_json(trained, {"export": {"unet": "a"}})
    edits = make_manifest("edit", config=training_of(stage, baseline), version=1, units=[])
    evaluate._refuse_earlier_training(stage, "sd", edits, tmp_path)
    write_json(trained, {"export": {"unet": "b"}})
    with pytest.raises(StageError, match=r"of models/full; run `dvc repro --force --single-item baseline@sd` first"):
        evaluate._refuse_earlier_training(stage, "sd", edits, tmp_path)
    tuned = VariantConfig.model_validate({"train": {"init": "models/full"}})
    variants = {"full": VariantConfig(), "tuned": tuned}
    stage = replace(stage, params=stage.params.model_copy(update={"variants": variants}))
    write_json(
        output_folder(tmp_path, "train", "tuned") / "manifest.json", {"init": training_named(stage, "models/full")}
    )
    evaluate._refuse_earlier_init(stage, "tuned")
    evaluate._refuse_earlier_init(stage, "full")
    write_json(trained, {"export": {"unet": "c"}})
    with pytest.raises(StageError, match=r"train@tuned: began from an earlier training of models/full; run `dvc repro"):
        evaluate._refuse_earlier_init(stage, "tuned")
    assert (
        training_of(make_stage(tmp_path, "weights/full"), baseline.model_copy(update={"model": "weights/full"})) == {}
    )
