"""`pbe edit`: writes the editor's PNG; every error is one line on stderr and exit code 1."""

import io
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from pbe.cli import default_model
from pbe.cli.__main__ import main
from pbe.data import images
from pbe.places import repo_root
from pbe.recipe import read_recipe
from tests.icc import WIDE


@pytest.fixture
def args(tmp_path: Path, model_folder: Path, backbone: Any) -> dict[str, str]:
    """Arguments of a good call, by name; the photo under "photo"."""
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 40, 3), np.uint8)
    mask[5:15, 8:25] = 255
    for name, image in {
        "photo": rng.integers(0, 256, (24, 40, 3)).astype(np.uint8),
        "mask": mask,
        "reference": rng.integers(0, 256, (50, 30, 3)).astype(np.uint8),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(images.encode_png(image))
    out = {name: str(tmp_path / f"{name}.png") for name in ("photo", "mask", "reference", "out")}
    return {**out, "model": str(model_folder), "steps": "2"}


def _run(args: dict[str, str]) -> int:
    return main(["edit", args["photo"], *_options(args)])


def _options(args: dict[str, str]) -> list[str]:
    return [part for name, value in args.items() if name != "photo" for part in (f"--{name}", value)]


def _pixels(path: str) -> np.ndarray:
    return images.decode(Path(path).read_bytes())


def test_without_a_model_it_takes_the_trained_one_or_the_repositorys(
    args: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(default_model, "repo_root", lambda: tmp_path)
    folder = Path(args.pop("model"))
    assert _run(args) == 1
    assert "no models/full and no models/pretrained/small" in capsys.readouterr().err
    for name in ("models/pretrained/small", "models/full"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(folder)
        assert _run(args) == 0
        assert capsys.readouterr().err == f"model: {name}\n"
        assert read_recipe(Path(args["out"])).model == str(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert _run(args) == 0 and read_recipe(Path(args["out"])).model == "models/full"


def test_it_writes_what_the_editor_returns(args: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    from pbe.diffusion.sampling import Sampling
    from pbe.edit import Editor

    assert _run(args) == 0
    assert capsys.readouterr() == (f"wrote {args['out']}\n", "")
    assert Path(args["out"]).read_bytes().startswith(b"\x89PNG")
    photo, hole_mask = _pixels(args["photo"]), _pixels(args["mask"])[..., 0] > 0
    (expected,) = Editor.load(Path(args["model"])).edit(
        photo, hole_mask, _pixels(args["reference"]), seed=42, sampling=Sampling(steps=2)
    )
    out = _pixels(args["out"])
    np.testing.assert_array_equal(out, expected)
    assert (out != photo)[hole_mask].any() and not (out != photo)[~hole_mask].any()


def test_every_option_reaches_the_editor(args: dict[str, str]) -> None:
    options = [
        {"steps": "1"},
        {"scale": "3"},
        {"seed": "1"},
        {"size": "32"},
        {"reference-fit": "pad"},
        {"context": "1"},
    ]
    results = []
    for changes in ({}, *options, {"protocol": "upstream"}):
        assert _run({**args, **changes}) == 0
        results.append(_pixels(args["out"]).tobytes())
    assert len(set(results)) == 8


def test_context_of_a_protocol_that_edits_the_whole_photo_is_one_line(
    args: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run({**args, "context": "2", "protocol": "diffusers"}) == 1
    err = capsys.readouterr().err
    assert "context_factor 2: this protocol edits the whole photo" in err and err.count("\n") == 1
    assert not Path(args["out"]).exists()


def test_soft_edges_of_the_mask_split_in_the_middle(args: dict[str, str]) -> None:
    mask = np.zeros((24, 40, 3), np.uint8)
    mask[:, 22:] = 255
    mask[:, 20] = 127
    mask[:, 21, 1] = 128  # any channel counts
    Path(args["mask"]).write_bytes(images.encode_png(mask))
    assert _run(args) == 0
    changed = (_pixels(args["out"]) != _pixels(args["photo"])).any(axis=2)
    assert changed[:, 21:].mean() > 0.9 and not changed[:, :21].any()


def _grey_mask(path: Path) -> None:
    path.write_bytes(images.encode_png(np.random.default_rng(1).integers(40, 210, (24, 40, 3)).astype(np.uint8)))


def _transparent_mask(path: Path) -> None:
    mask = Image.new("RGBA", (40, 24), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (5, 5, 15, 15))
    mask.save(path)


def _white_mask(path: Path) -> None:
    Image.new("L", (40, 24), 255).save(path)


def _dim_mask(path: Path) -> None:
    mask = np.zeros((24, 40), np.uint8)
    mask[5:15, 8:25] = 3
    Image.fromarray(mask).save(path)


def _dim_mask_of_16_bits(path: Path) -> None:
    mask = np.zeros((24, 40), np.uint16)
    mask[5:15, 8:25] = 1
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_mask_of_0_and_1_is_black_and_white(mode: str, args: dict[str, str]) -> None:
    assert _run(args) == 0
    wanted = _pixels(args["out"])
    mask = (_pixels(args["mask"])[..., 0] > 0).astype(np.uint8)
    image = Image.fromarray(mask).convert(mode)
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 1, 1])
    image.save(args["mask"])
    assert _run(args) == 0
    np.testing.assert_array_equal(_pixels(args["out"]), wanted)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (_dim_mask, "mask.png: its largest value is 3 of 255"),
        (_dim_mask_of_16_bits, "mask.png: no value of its 16 bits reaches 256"),
        (_grey_mask, "mask.png: mostly greys where it is not black"),
        (_transparent_mask, "mask.png: has transparent parts"),
        (_white_mask, "hole_mask covers the whole photo"),
    ],
)
def test_a_mask_that_says_nothing_clear_is_refused(
    write: Callable[[Path], None], told: str, args: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path(args["mask"]))
    assert _run(args) == 1
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1 and not Path(args["out"]).exists()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_of_a_reference_are_white_whatever_colour_they_hide(mode: str, args: dict[str, str]) -> None:
    results = []
    for hidden in ((0, 255, 0, 0), (90, 90, 90, 0)):
        reference = Image.new("RGBA", (30, 50), hidden)
        reference.paste((200, 200, 200, 255), (5, 5, 20, 40))
        if mode == "P":
            reference = reference.quantize()
        reference.convert(mode).save(args["reference"])
        assert _run(args) == 0
        results.append(_pixels(args["out"]).tobytes())
    assert results[0] == results[1]


def test_a_phones_photo_is_edited_upright_as_every_viewer_shows_it(args: dict[str, str], tmp_path: Path) -> None:
    """The mask is painted over what a viewer shows; the result is that picture, without an EXIF tag."""
    upright = _pixels(args["photo"])
    stored = Image.fromarray(np.rot90(upright))  # rotated left; orientation 6 means: rotate right to view
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored.save(tmp_path / "phone.png", exif=exif)
    assert _run({**args, "photo": str(tmp_path / "phone.png")}) == 0
    out, hole_mask = _pixels(args["out"]), _pixels(args["mask"])[..., 0] > 0
    np.testing.assert_array_equal(out[~hole_mask], upright[~hole_mask])
    assert images.read_header(Path(args["out"]).read_bytes()).exif_orientation == images.UPRIGHT


def test_a_photo_of_a_wide_gamut_is_edited_in_srgb_and_that_is_said(
    args: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG without a profile is sRGB to a viewer: with the photo's own numbers the colours would change."""
    photo = Image.fromarray(_pixels(args["photo"]))
    photo.save(tmp_path / "wide.png", icc_profile=WIDE)
    assert _run({**args, "photo": str(tmp_path / "wide.png")}) == 0
    assert f"{tmp_path / 'wide.png'}: colours converted from its profile to sRGB\n" in capsys.readouterr().out
    profile = ImageCms.ImageCmsProfile(io.BytesIO(WIDE))
    seen = np.asarray(ImageCms.profileToProfile(photo, profile, ImageCms.createProfile("sRGB"))).astype(int)
    outside = _pixels(args["mask"])[..., 0] == 0
    assert np.abs(_pixels(args["out"])[outside] - seen[outside]).max() <= 1 < np.abs(seen - np.asarray(photo)).max()


def test_transparency_turns_with_the_photo(args: dict[str, str], tmp_path: Path) -> None:
    """A PNG whose orientation stands in its XMP: pixels and transparency once disagreed about it."""
    upright = np.dstack([_pixels(args["photo"]), np.full((24, 40), 255, np.uint8)])
    upright[:, 30:, 3] = 0
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", pnginfo=text)
    assert _run({**args, "photo": str(tmp_path / "turned.png")}) == 0
    out = _pixels(args["out"])
    assert (out[:, 30:] == 255).all()
    np.testing.assert_array_equal(out[:5, :30], upright[:5, :30, :3])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["photo", "mask", "reference"])
def test_no_picture_is_waited_for_or_unpacked_beyond_the_limit(
    name: str, args: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for file, told in {
        "pipe.png": "a named pipe, not a file",
        "endless.png": "a device, not a file",
        "large.png": "13000 x 13000 px, more than 89000000 pixels",
    }.items():
        assert _run({**args, name: str(tmp_path / file)}) == 1
        assert capsys.readouterr().err == f"pbe: error: {tmp_path / file}: {told}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"photo": "nothing.png"}, ["nothing.png", "No such file"]),
        ({"mask": "nothing.png"}, ["nothing.png", "No such file"]),
        ({"reference": "words.txt"}, ["words.txt", "not a readable image"]),
        ({"mask": "small.png"}, ["small.png is 3 x 2 px, the photo 40 x 24"]),
        ({"mask": "black.png"}, ["hole_mask is empty"]),
        ({"scale": "2", "actors": "2"}, ["--actors: only with --table"]),
        ({"model": "nothing"}, ["nothing: no unet/config.json", "models/<variant>"]),
        ({"model": "broken"}, ["broken/unet: no diffusion_pytorch_model.safetensors"]),
        ({"out": "edit.jpg"}, ["--out", "edit.jpg: must end in .png"]),
        ({"out": "nowhere/edit.png"}, ["--out nowhere/edit.png", "there is no folder nowhere"]),
        ({"steps": "0"}, ["steps 0"]),
        ({"steps": "-3"}, ["steps -3"]),
        ({"scale": "nan"}, ["guidance scale nan"]),
    ],
    ids=str,
)
def test_an_error_is_one_line_on_stderr_and_exit_code_one(
    changes: dict[str, str],
    words: list[str],
    args: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("no image")
    Path("small.png").write_bytes(images.encode_png(np.full((2, 3, 3), 255, np.uint8)))
    Path("black.png").write_bytes(images.encode_png(np.zeros((24, 40, 3), np.uint8)))
    Path("broken").mkdir()
    (Path("broken") / "unet").mkdir()
    (Path("broken") / "unet" / "config.json").write_bytes(b"{}")
    assert _run({**args, **changes}) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pbe: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert all(word in err for word in words), err
    assert not Path(args["out"]).exists()


def test_a_box_is_a_mask_and_part_of_the_reference_is_a_reference(args: dict[str, str], tmp_path: Path) -> None:
    assert _run(args) == 0
    by_mask = _pixels(args["out"])
    reference = _pixels(args["reference"])
    larger = np.pad(reference, ((7, 3), (4, 9), (0, 0)), constant_values=200)
    (tmp_path / "larger.png").write_bytes(images.encode_png(larger))
    height_px, width_px = reference.shape[:2]
    boxed = {key: value for key, value in args.items() if key != "mask"} | {
        "box": "8,5,25,15",
        "reference": str(tmp_path / "larger.png"),
        "reference-box": f"4,7,{4 + width_px},{7 + height_px}",
    }
    assert _run(boxed) == 0
    np.testing.assert_array_equal(_pixels(args["out"]), by_mask)


def test_n_edits_are_a_folder_of_seeds_or_one_grid(
    args: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "edits"
    assert _run({**args, "n": "3", "out": str(folder), "seed": "5"}) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["seed-5.png", "seed-6.png", "seed-7.png"]
    assert _run({**args, "seed": "6"}) == 0
    np.testing.assert_allclose(_pixels(str(folder / "seed-6.png")).astype(int), _pixels(args["out"]), atol=1)
    assert main(["edit", args["photo"], *_options({**args, "n": "3"}), "--grid"]) == 0
    grid, photo = _pixels(args["out"]), _pixels(args["photo"])
    assert grid.shape[0] >= photo.shape[0] and grid.shape[1] >= 5 * photo.shape[1]
    capsys.readouterr()
    assert _run({**args, "n": "3"}) == 1
    assert "3 edits need a folder, or --grid" in capsys.readouterr().err


def test_a_full_disk_keeps_the_edit_that_was_there(
    args: dict[str, str], full_disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(args) == 0
    before = {path: path.read_bytes() for path in Path(args["out"]).parent.iterdir() if path.is_file()}
    full_disk(100)
    assert _run({**args, "seed": "1"}) == 1
    assert "File too large" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path(args["out"]).parent.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("box", ["0,0,41,10", "-1,0,3,3"])
def test_a_box_outside_the_photo_is_one_line(
    box: str, args: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del args["mask"]
    assert main(["edit", args["photo"], *_options(args), f"--box={box}"]) == 1
    err = capsys.readouterr().err
    assert f"{box} is not inside its 40 x 24 px" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "command"),
        (["edit", "photo.png"], 2, "required: --out"),
        (["edit", "a", "--mask", "b", "--box", "1,2,3,4"], 2, "not allowed with argument --mask"),
        (["edit", "a", "--box", "1,2,3"], 2, "four whole numbers are needed"),
        (["--help"], 0, "exemplar-based"),
        (["gc", "--older-than-h", "nan"], 2, "nan: must be 0 or more"),
        (["show", "triplets", "--rows", "0"], 2, "0: must be 1 or more"),
        (["edit", "--seed", "-3"], 2, "-3: must be 0 or more"),
        (["edit", "--context", "0.5"], 2, "0.5: must be 1 or more"),
        (["edit", "--box", "5,5,5,9"], 2, "5,5,5,9: x0 must be less than x1"),
        (["gc", "--help"], 0, "without it, only list"),
        (["edit", "--help"], 0, "white where the edit goes"),
    ],
    ids=str,
)
def test_usage(argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == code
    assert words in " ".join((captured.out + captured.err).split())


def test_the_console_script_leads_here_and_help_needs_no_torch() -> None:
    project = tomllib.loads((repo_root() / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["pbe"].split(":")
    assert getattr(import_module(module), name)(["edit", "--table", "none.csv", "--out", "none"]) == 1
    code = f"import sys; import {module}; sys.exit(bool({{'torch', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root(), check=False).returncode == 0
