"""The text encoder that train finds for a text variant, or the one line that says which key is wrong."""

from pathlib import Path
from typing import Any

import pytest

from pbe.config import parse_params
from pbe.model.weight_store import open_text_encoder
from pbe.store import Store
from pipelines.commands.profile import full_text
from pipelines.runtime.stage import Stage, StageError
from pipelines.train_weights import StoredText, initial_weights, text_encoder
from tests.profiles import FOLDER, profile
from tests.tiny_weights import CAPTION_TOKENS, CONTEXT_WIDTH, write_clip, write_paint_by_example


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Of paper-tiny, whose backbone is a CLIP with both its parts."""
    write_clip(tmp_path / "clip")
    params = parse_params(full_text(FOLDER, "paper-tiny").replace("@ROOT@", str(tmp_path)), "paper-tiny")
    return Stage("train", "text", params, Store(str(tmp_path / "store")), tmp_path)


def _found(stage: Stage, **changes: Any) -> StoredText:
    cfg = stage.params.train_variant("text")
    text = cfg.text.model_copy(update=changes)
    return text_encoder(stage, cfg.model_copy(update={"text": text}))


def test_by_default_it_is_the_backbones_and_its_content_names_it(stage: Stage, tmp_path: Path) -> None:
    found = _found(stage)
    assert found.tokens == CAPTION_TOKENS
    moved = write_clip(tmp_path / "elsewhere")
    assert _found(stage, encoder=str(moved)) == found
    for path in (tmp_path / "clip", moved):
        (path / "model.safetensors").unlink()
    assert open_text_encoder(stage.store, found.path).width == CONTEXT_WIDTH  # the storage keeps what was read


def test_a_backbone_that_is_no_clip_needs_one_named(stage: Stage) -> None:
    offline = Stage("train", "text", profile("tiny"), stage.store, stage.root)
    cfg = stage.params.train_variant("text")
    with pytest.raises(
        StageError, match=r"train@text: .*encode\.backbone is no CLIP; name a CLIP .*train\.text\.encoder"
    ):
        text_encoder(offline, cfg)


def test_a_folder_without_text_and_another_width_name_their_key(stage: Stage, tmp_path: Path) -> None:
    write_paint_by_example(tmp_path / "exemplars")
    with pytest.raises(StageError, match=r"train\.text\.encoder = .*exemplars: .*no config\.json in it"):
        _found(stage, encoder=str(tmp_path / "exemplars"))
    cfg = stage.params.train_variant("text")
    wide = cfg.model_copy(update={"unet": cfg.unet.model_copy(update={"context_width": 32})})
    with pytest.raises(StageError, match=r"tokens have width 24; set train\.unet\.context_width \(32\) to that"):
        text_encoder(stage, wide)


def test_a_model_of_exemplars_is_no_beginning(stage: Stage, tmp_path: Path) -> None:
    from pbe.store import make_manifest

    write_paint_by_example(tmp_path / "exemplars")
    cfg = stage.params.train_variant("text").model_copy(update={"init": str(tmp_path / "exemplars")})
    encoded = make_manifest("encode", config={"codec": {"kind": "kl", "path": ""}}, version=1, units=[])
    with pytest.raises(StageError, match="starts from Stable Diffusion"):
        initial_weights(stage, cfg, encoded)
