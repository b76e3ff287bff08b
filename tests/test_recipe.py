"""An edit's recipe: makes it again bit for bit, and a stranger's recipe harms nobody."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pbe.cli.__main__ import main
from pbe.data import images
from pbe.data.metadata import with_png_text
from pbe.recipe import (
    KEYWORD,
    MAX_RECIPE_BYTES,
    Picture,
    Recipe,
    RecipeError,
    is_same,
    open_inputs,
    png_with_recipe,
    read_recipe,
    recipe_from,
)


@pytest.fixture
def folder(
    tmp_path: Path, model_folder: Path, edit_pictures: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """photo.png, mask.png, reference.png in a folder beside models/tiny; the working folder is above."""
    (tmp_path / "in").mkdir()
    for name, image in edit_pictures.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(images.encode_png(image))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _edit(*options: str) -> None:
    named = ["--reference", "in/reference.png", "--model", "models/tiny", "--steps", "2"]
    assert main(["edit", "in/photo.png", *named, *options]) == 0


def _pixels(path: Path) -> np.ndarray:
    return images.decode(path.read_bytes())


@pytest.mark.parametrize(
    "options",
    [
        ["--box", "8,5,25,15", "--context", "inf", "--reference-box", "3,4,20,30", "--reference-fit", "pad"],
        ["--mask", "in/mask.png", "--protocol", "upstream", "--sampler", "ddim", "--scale", "2"],
        ["--mask", "in/mask.png", "--protocol", "diffusers", "--size", "32"],
    ],
    ids=["ours", "upstream", "diffusers"],
)
def test_an_edit_is_made_again_from_its_png_and_from_json(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three edits: its forward had three rows, which changes the last bits."""
    _edit(*options, "--n", "3", "--seed", "5", "--out", "out")
    edit = folder / "out" / "seed-6.png"
    recipe = read_recipe(edit)
    assert recipe.seed == 6 and recipe.batch_rows == 3 and is_same(recipe, _pixels(edit))
    (folder / "out" / "recipe.json").write_text(recipe.to_json())
    for source in (edit, folder / "out" / "recipe.json"):
        capsys.readouterr()
        assert main(["edit", "--recipe", str(source), "--out", "again.png"]) == 0
        assert "the same, bit for bit" in capsys.readouterr().out
        assert (folder / "again.png").read_bytes() == edit.read_bytes()


def test_an_edit_without_a_scale_has_that_of_the_models_card(folder: Path) -> None:
    table = "photo,box,reference\nin/photo.png,8 5 25 15,in/reference.png\n"
    (folder / "edits.csv").write_text(table.replace("8 5 25 15", '"8,5,25,15"'))
    card = folder / "models" / "tiny" / "pbe.json"
    said = json.loads(card.read_text())
    for scale, options in ((5.0, []), (2.5, []), (1.0, ["--scale", "1"])):
        card.write_text(json.dumps(said | ({"guidance_scale": 2.5} if scale == 2.5 else {})))
        _edit("--box", "8,5,25,15", "--out", "one.png", *options)
        named = ["--model", "models/tiny", "--steps", "2", "--out", f"of-{scale:g}"]
        assert main(["edit", "--table", "edits.csv", *named, *options]) == 0
        (made,) = (folder / f"of-{scale:g}").glob("*.png")
        assert read_recipe(folder / "one.png").guidance_scale == read_recipe(made).guidance_scale == scale


def test_a_table_of_models_with_different_scales_asks_for_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "edits.csv").write_text('photo,box,reference\nin/photo.png,"8,5,25,15",in/reference.png\n')
    shutil.copytree(folder / "models" / "tiny", folder / "models" / "other")
    card = folder / "models" / "other" / "pbe.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"guidance_scale": 2.5}))
    table = ["edit", "--table", "edits.csv", "--model", "models/tiny", "--model", "models/other", "--out", "out"]
    assert main([*table, "--steps", "2"]) != 0
    assert "scales differ (5 of models/tiny, 2.5 of models/other); name one" in capsys.readouterr().err
    assert main([*table, "--steps", "2", "--scale", "3"]) == 0


def test_pictures_are_found_where_they_were_or_beside_the_recipe(folder: Path) -> None:
    _edit("--mask", "in/mask.png", "--out", "edited.png")
    assert read_recipe(folder / "edited.png").photo.name == "in/photo.png"
    shutil.move(folder / "in", folder / "elsewhere")
    shutil.move(folder / "edited.png", folder / "elsewhere")
    assert main(["edit", "--recipe", "elsewhere/edited.png", "--out", "again.png"]) == 0


def test_a_recipe_that_contains_its_pictures_needs_no_file(folder: Path) -> None:
    _edit("--mask", "in/mask.png", "--out", "edited.png")
    recipe = read_recipe(folder / "edited.png")
    with pytest.raises(RecipeError, match=r"in/photo.png: this recipe names the file but does not contain it"):
        open_inputs(recipe, None)
    contained = {
        field: Picture.embedded(f"../x/{field}.png", (folder / getattr(recipe, field).name).read_bytes())
        for field in ("photo", "hole", "reference")
    }
    whole = recipe.model_copy(update=contained)
    assert whole.photo.name == "photo.png"
    read = recipe_from(png_with_recipe(_pixels(folder / "edited.png"), whole), "edited.png")
    for wanted, got in zip(open_inputs(recipe, folder), open_inputs(read, None), strict=True):
        np.testing.assert_array_equal(wanted, got)


def test_a_changed_picture_other_weights_and_other_pixels_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit("--mask", "in/mask.png", "--out", "edited.png")
    recipe = read_recipe(folder / "edited.png")
    capsys.readouterr()
    (folder / "other.json").write_text(recipe.model_copy(update={"pixels_sha256": 64 * "0"}).to_json())
    assert main(["edit", "--recipe", "other.json", "--out", "again.png"]) == 1
    out, err = capsys.readouterr()
    assert "not the same pixels" in out and "other.json: made on cpu with pbe" in err
    original = (folder / "in" / "photo.png").read_bytes()
    Image.new("RGB", (40, 24)).save(folder / "in" / "photo.png")
    assert main(["edit", "--recipe", "edited.png", "--out", "again.png"]) == 1
    assert "in/photo.png: not the picture of this recipe, its sha256 differs" in capsys.readouterr().err
    (folder / "in" / "photo.png").write_bytes(original)
    scheduler = folder / "models" / "tiny" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert main(["edit", "--recipe", "edited.png", "--out", "again.png"]) == 1
    assert "edited.png: the weights of models/tiny differ from the recipe's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["in/photo.png"], "a photo cannot be combined with --recipe"),
        (["--seed", "3"], "--seed cannot be combined with --recipe"),
        (["--reference-box", "1,1,2,2"], "--reference-box cannot be combined with --recipe"),
        (["--n", "2"], "--n cannot be combined with --recipe"),
    ],
)
def test_what_a_recipe_says_is_not_said_twice(
    options: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", *options, "--recipe", "edited.png", "--out", "again.png"]) == 1
    assert told in capsys.readouterr().err


@pytest.fixture
def raw(folder: Path) -> dict[str, Any]:
    _edit("--box", "8,5,25,15", "--out", "edited.png")
    recipe: dict[str, Any] = json.loads(read_recipe(folder / "edited.png").to_json())
    return recipe


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": -1}, "seed: "),
        ({"colour": 1}, "colour: unknown key"),
        ({"version": 2}, "version: "),
        ({"hole": [8, 5, 8, 15]}, "hole.box: empty box"),
        ({"hole": [8, 5, 8.5, 15]}, "hole.box: a box is four whole numbers"),
        ({"context_factor": 0.5}, "context_factor: "),
        ({"batch_rows": 1_000_000}, "batch_rows: "),
        ({"steps": 0}, "steps: "),
        ({"size_px": 10**6}, "size_px: "),
        ({"guidance_scale": "Infinity"}, "guidance_scale: "),
        ({"photo": {"name": "/etc/passwd", "sha256": 64 * "0"}}, "photo.name: must be a path from the recipe's folder"),
        ({"photo": {"name": "a\0b", "sha256": 64 * "0"}}, "photo.name: must be"),
        ({"photo": {"name": "a.png", "sha256": 64 * "0", "data": "?"}}, "photo.data: "),
    ],
    ids=str,
)
def test_a_strangers_recipe_is_refused_by_its_key(
    changes: dict[str, Any], told: str, raw: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.json").write_text(json.dumps(raw | changes))
    assert main(["edit", "--recipe", "bad.json", "--out", "again.png"]) == 1
    err = capsys.readouterr().err
    assert f"bad.json: {told}" in err and len(err.splitlines()) == 1 and not (folder / "again.png").exists()


@pytest.mark.timeout(60)
def test_a_strangers_recipe_opens_no_other_file_and_unpacks_no_bomb(
    raw: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "pipe")
    for name, told in {
        "../" * 30 + "etc/passwd": "its sha256 differs",
        "../" * 30 + "dev/zero": "no such file",
        "pipe": "no such file",
    }.items():
        recipe = Recipe.model_validate(raw | {"photo": {"name": name, "sha256": 64 * "0"}})
        with pytest.raises(RecipeError, match=told):
            open_inputs(recipe, folder)
    packer = zlib.compressobj()
    packed = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range((MAX_RECIPE_BYTES >> 20) + 8)), packer.flush()])
    png = images.encode_png(np.zeros((4, 4, 3), np.uint8))
    plain = with_png_text(png, KEYWORD, "x")
    body = b"iTXt" + KEYWORD.encode() + b"\0\1\0\0\0" + packed
    chunk = len(body[4:]).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    bomb = plain[: plain.index(b"iTXt") - 4] + chunk
    with pytest.raises(RecipeError, match=r"bomb.png: more than \d+ bytes"):
        recipe_from(bomb, "bomb.png")
    with pytest.raises(RecipeError, match=r"plain.png: no recipe in this PNG"):
        recipe_from(png, "plain.png")
    with pytest.raises(RecipeError, match=r"plain.png: not a recipe of pbe: not JSON"):
        recipe_from(plain, "plain.png")
    (folder / "hub.json").write_text(json.dumps(raw | {"model": "some/model@main"}))
    assert main(["edit", "--recipe", "hub.json", "--out", "again.png"]) == 1
    assert "to allow the download, add --model some/model@main" in capsys.readouterr().err
