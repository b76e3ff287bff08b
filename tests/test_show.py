"""`pbe show triplets`: a contact sheet of given photos or random rows, and what each of its columns shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe import places
from pbe.cli.__main__ import main
from pbe.data import images
from pbe.data.contact import HOLE_GREY, TILE_PX
from pbe.data.masks import pack_mask
from pbe.data.schema import TRIPLETS
from pbe.data.slots import slot_name
from pbe.store import Store, make_manifest, save_manifest

SLOTS, CROP_PX, GAP_PX = 5, 32, 2
PHOTOS = [["apple", "pear"], [], ["plum", "quince", "rowan"]]  # by shard
IDS = [image_id for shard in PHOTOS for image_id in shard]


def _grey(image_id: str, slot: int) -> int:
    """Grey level of the source crop; the reference is darker by 5."""
    return 40 + 30 * IDS.index(image_id) + 2 * slot


def _row(image_id: str, slot: int) -> dict[str, Any]:
    box, bezier = np.zeros((2, CROP_PX, CROP_PX), np.uint8)
    box[8:24, 4:28] = 1
    bezier[12:20, 12:20] = 1
    grey = _grey(image_id, slot)
    return {
        "image_id": image_id,
        "slot": slot,
        "box_index": 0,
        "label_name": f"class of {image_id}",
        "source": images.encode_jpeg(np.full((CROP_PX, CROP_PX, 3), grey, np.uint8), 100),
        "box_hole_mask": pack_mask(box),
        "bezier_hole_mask": pack_mask(bezier),
        "reference": images.encode_jpeg(np.full((50, 50, 3), grey - 5, np.uint8), 100),
        **{f"box_{side}_px": 0.0 for side in ("x0", "y0", "x1", "y1")},
    }


def _materialize(root: Path, store: Store, photos: list[list[str]]) -> None:
    units = []
    for shard, image_ids in enumerate(photos):
        tables = {
            slot_name(slot): pa.Table.from_pylist([_row(image_id, slot) for image_id in image_ids], schema=TRIPLETS)
            for slot in range(SLOTS)
        }
        units.append(store.write_unit("materialize", f"s{shard:04d}-0", tables, counts={}))
    manifest = make_manifest("materialize", config={}, version=1, units=units)
    save_manifest(root / "data" / "materialize" / "manifest.json", manifest)


@pytest.fixture
def root(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder where materialize has run."""
    monkeypatch.setattr(places, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    _materialize(tmp_path, store, PHOTOS)
    return tmp_path


def _show(root: Path, *more: str) -> tuple[int, np.ndarray]:
    """Exit code, and the middle of each tile: (rows, columns, 3)."""
    out = root / "sheet.png"
    code = main(["show", "triplets", "--out", str(out), *more])
    if code:
        assert not out.exists()
        return code, np.empty(0)
    step, middle = TILE_PX + GAP_PX, GAP_PX + TILE_PX // 2
    sheet = images.decode(out.read_bytes())
    assert (sheet.shape[0] - GAP_PX) % step == 0 and (sheet.shape[1] - GAP_PX) % step == 0
    return 0, sheet[middle::step, middle::step].astype(int)


def _names(capsys: pytest.CaptureFixture[str], root: Path) -> list[str]:
    *names, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {root / 'sheet.png'}"
    return names


def test_given_photos_are_shown_slot_by_slot_in_the_order_given(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, tiles = _show(root, "--ids", "rowan", "apple", "--rows", "6")
    assert code == 0
    assert _names(capsys, root) == [
        f"{image_id} slot {slot}: class of {image_id}" for image_id in ("rowan", "apple") for slot in range(3)
    ]
    greys = np.array([_grey(image_id, slot) for image_id in ("rowan", "apple") for slot in range(3)])
    source, box, bezier, reference = tiles
    for row, expected in ((source, greys), (reference, greys - 5)):
        assert np.abs(row - expected[:, None]).max() <= 1
    assert (box == HOLE_GREY).all() and (bezier == HOLE_GREY).all()  # their holes are in the middle


def test_names_are_shown_without_control_characters(
    root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    row = _row("plum", 0) | {"label_name": "Dog\x1b[2J\u202e"}
    table = pa.Table.from_pylist([row], schema=TRIPLETS)
    unit = store.write_unit("materialize", "s0009-0", {slot_name(0): table}, counts={})
    manifest = make_manifest("materialize", config={}, version=1, units=[unit])
    save_manifest(root / "data" / "materialize" / "manifest.json", manifest)
    assert _show(root, "--rows", "1")[0] == 0
    assert _names(capsys, root) == [r"plum slot 0: Dog\x1b[2J\u202e"]


def test_holes_are_where_their_masks_are(root: Path) -> None:
    assert _show(root, "--ids", "plum", "--rows", "1")[0] == 0
    sheet = images.decode((root / "sheet.png").read_bytes())
    tiles = [sheet[GAP_PX + n * (TILE_PX + GAP_PX) :][:TILE_PX, GAP_PX : GAP_PX + TILE_PX] for n in range(4)]
    shares = [(tile[..., 0] == HOLE_GREY).mean() for tile in tiles]
    assert shares[0] == shares[3] == 0
    assert shares[1] == pytest.approx(16 * 24 / CROP_PX**2, abs=0.03)
    assert shares[2] == pytest.approx(8 * 8 / CROP_PX**2, abs=0.03)


def test_random_rows_come_from_all_photos_and_slots_each_once_and_follow_the_seed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {f"{image_id} slot {slot}: class of {image_id}" for image_id in IDS for slot in range(SLOTS)}
    _, tiles = _show(root, "--rows", "100")
    names = _names(capsys, root)
    assert set(names) == every and len(names) == len(every) == tiles.shape[1]
    for column, name in enumerate(names):
        image_id, _, slot, *_ = name.replace(":", "").split()
        assert np.abs(tiles[0, column] - _grey(image_id, int(slot))).max() <= 1
    drawn = []
    for seed in ("0", "0", "1"):
        assert _show(root, "--rows", "4", "--seed", seed)[1].shape[1] == 4
        drawn.append(_names(capsys, root))
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_photos_than_rows_show_each_photo_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _show(root, "--ids", "apple", "pear", "plum", "--rows", "2")[0] == 0
    assert [name.split(":")[0] for name in _names(capsys, root)] == [f"{i} slot 0" for i in ("apple", "pear", "plum")]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ids", "apple", "kiwi", "fig"], "no triplet of kiwi, fig; `pbe rejects` says what was dropped"),
        (["--out", "sheet.jpg"], "must end in .png"),
        (["--out", "nowhere/sheet.png"], "there is no folder nowhere"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_line(
    root: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert _show(root, *more)[0] == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pbe: error: ") and err.count("\n") == 1 and words in err


def test_a_part_that_is_gone_is_named_with_the_command_that_makes_it_again(
    root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in Path(store.path("parts/materialize")).rglob("*.parquet"):
        part.unlink()
    assert _show(root)[0] == 1
    assert "this part is gone; `dvc repro -f -s materialize` makes it again" in capsys.readouterr().err


def test_without_triplets_it_says_so(root: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _materialize(root, store, [[], []])
    assert _show(root)[0] == 1
    assert "materialize has no triplet of any photo" in capsys.readouterr().err
    (root / "data" / "materialize" / "manifest.json").unlink()
    assert _show(root)[0] == 1
    assert "run `dvc repro materialize` first" in capsys.readouterr().err
