"""A text-conditioned model: saved, exported, opened and asked for edits by captions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.cli.__main__ import main
from pbe.data import images
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor, EditTask, ReferenceKindError
from pbe.export import export_model
from pbe.model.text import CaptionError
from pbe.model.weights import load_model, save_model
from tests.tiny_weights import IMAGE_PX, paper_model, text_model, write_paint_by_example

SAMPLING = Sampling(guidance_scale=3.0, steps=2)
RED, BLUE = "a photo of a red car", "a blue dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "text"
    save_model(folder, text_model())
    return folder


@pytest.fixture(scope="module")
def editor(folder: Path) -> Editor:
    return Editor.load(folder, device="cpu")


def _photo() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    photo = images.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), width_px=48, height_px=40)
    hole_mask = np.zeros((40, 48), np.uint8)
    hole_mask[10:25, 12:30] = 1
    return photo, hole_mask


def test_a_folder_is_the_model_and_an_export_is_the_folder(folder: Path, tmp_path: Path) -> None:
    assert not (folder / "image_encoder").exists() and not (folder / "model_index.json").exists()
    model, made = load_model(folder), text_model()
    assert model.card == made.card and model.card.condition == "text"
    assert {name: value.tolist() for name, value in model.network.state_dict().items()} == {
        name: value.tolist() for name, value in made.network.state_dict().items()
    }  # the empty caption's tokens too, which are computed again
    export_model(tmp_path, str(folder), tmp_path / "export")
    for path in (path for path in folder.rglob("*") if path.suffix == ".safetensors"):
        assert (tmp_path / "export" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    card = (tmp_path / "export" / "README.md").read_text()
    assert 'edit(photo, hole_mask, "a photo of a red car", seed=7)' in card and "all tokens of clip_text_model" in card


def test_the_caption_decides_what_appears_and_the_others_of_its_batch_do_not(editor: Editor) -> None:
    photo, hole_mask = _photo()
    [red] = editor.edit(photo, hole_mask, RED, seed=1, sampling=SAMPLING)
    [blue] = editor.edit(photo, hole_mask, BLUE, seed=1, sampling=SAMPLING)
    assert (red != blue)[hole_mask > 0].mean() > 0.2
    np.testing.assert_array_equal(red[hole_mask == 0], photo[hole_mask == 0])
    both = editor.edit_batch(
        [EditTask(photo, hole_mask, BLUE, 1), EditTask(photo, hole_mask, RED, 1)], sampling=SAMPLING
    )
    assert np.abs(both[1].astype(int) - red).max() <= 1  # float sums of another batch size


def test_without_a_condition_the_empty_caption_speaks(editor: Editor) -> None:
    """At scale 0 the conditional prediction has no weight: the edit is that of the empty caption."""
    photo, hole_mask = _photo()
    nothing = Sampling(guidance_scale=0.0, steps=2)
    [dropped] = editor.edit(photo, hole_mask, RED, seed=1, sampling=nothing)
    [empty] = editor.edit(photo, hole_mask, "", seed=1, sampling=Sampling(guidance_scale=1.0, steps=2))
    assert np.abs(dropped.astype(int) - empty).max() <= 1


def test_the_wrong_kind_of_reference_and_a_long_caption_are_one_line(editor: Editor) -> None:
    photo, hole_mask = _photo()
    with pytest.raises(ReferenceKindError, match="condition is text: its reference is a caption, not a picture"):
        editor.edit(photo, hole_mask, photo, seed=1)
    with pytest.raises(ReferenceKindError, match="condition is exemplar: its reference is a picture, not a caption"):
        Editor(paper_model(), torch.device("cpu")).edit(photo, hole_mask, RED, seed=1)
    square = np.zeros((1, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    with pytest.raises(ReferenceKindError):
        editor.edit_crops(square, square[..., 0], [square[0]], seeds=[1], sampling=SAMPLING)
    with pytest.raises(CaptionError, match="this model reads 40; shorten it"):
        editor.edit(photo, hole_mask, "long " * 20, seed=1)


def test_pbe_edit_takes_a_caption(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, _ = _photo()
    (tmp_path / "photo.png").write_bytes(images.encode_png(photo))
    write_paint_by_example(tmp_path / "exemplar")
    base = ["edit", str(tmp_path / "photo.png"), "--box", "12,10,30,25", "--steps", "2"]
    to = ["--out", str(tmp_path / "edit.png")]
    assert main([*base, "--caption", RED, "--model", str(folder), *to, "--grid"]) == 0
    assert images.decode((tmp_path / "edit.png").read_bytes()).shape[1] == 2 * 48 + 4  # photo and edit
    for arguments, message in (
        (["--caption", RED, "--model", str(tmp_path / "exemplar")], "its reference is a picture, not a caption"),
        (["--reference", str(tmp_path / "photo.png"), "--model", str(folder)], "is a caption, not a picture"),
        (["--caption", RED, "--reference-box", "0,0,4,4", "--model", str(folder)], "--reference-box"),
    ):
        assert main([*base, *arguments, *to]) == 1
        assert message in capsys.readouterr().err
