"""Folders of other methods' results: read as they are, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pbe.data import images
from pbe.errors import UserError
from pbe.evaluate.bench.results import ResultsError, find_results, read_result, read_results, result_name

IDS = ["000000012345", "a/b.jpg#0#1", "ü 7#2#0"]
SIZES_PX = {IDS[0]: (16, 12), IDS[1]: (8, 10), IDS[2]: (16, 12)}


def _picture(bench_id: str) -> np.ndarray:
    width_px, height_px = SIZES_PX[bench_id]
    seed = IDS.index(bench_id)
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3)).astype(np.uint8)


def _write(folder: Path, bench_id: str, suffix: str = ".png") -> Path:
    path = folder / f"{result_name(bench_id)}{suffix}"
    path.write_bytes(images.encode_png(_picture(bench_id)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for bench_id in IDS:
        _write(tmp_path, bench_id)
    return tmp_path


def test_results_come_by_id_in_the_benchs_order(folder: Path) -> None:
    edits, found = read_results(folder, dict(reversed(SIZES_PX.items())), allow_missing=False)
    assert list(edits) == list(found.paths) == IDS[::-1]
    for bench_id in IDS:
        np.testing.assert_array_equal(edits[bench_id], _picture(bench_id))
    assert not found.missing and found.extra_files == 0


def test_the_names_are_upstreams_and_safe() -> None:
    assert result_name("000000012345") == "000000012345"
    assert result_name("000000000139#0#1") == "000000000139#0#1"
    assert result_name("a/b#0#1") == "a%2Fb#0#1"
    assert "/" not in result_name("../x") and "\\" not in result_name("..\\x")


@given(st.lists(st.text(st.sampled_from("a/%2F#_-. ü~"), min_size=1, max_size=6), unique=True))
def test_two_ids_never_share_a_name(ids: list[str]) -> None:
    assert len({result_name(bench_id) for bench_id in ids}) == len(ids)


def test_long_ids_have_names_a_file_system_takes(tmp_path: Path) -> None:
    ids = ["ü" * 300, "ü" * 300 + "x", "a" * 151, "a" * 150]
    for bench_id in ids:
        (tmp_path / f"{result_name(bench_id)}.jpeg").touch()
    found = find_results(tmp_path, ids, allow_missing=False)
    assert len(set(found.paths.values())) == 4
    assert result_name("a" * 150) == "a" * 150


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".jpg", ".JPEG"])
def test_four_formats_are_read(tmp_path: Path, suffix: str) -> None:
    smooth = cv2.resize(_picture(IDS[0])[:3, :4], (16, 12), interpolation=cv2.INTER_LINEAR)
    path = tmp_path / f"{IDS[0]}{suffix}"
    kind = {".png": "PNG", ".webp": "WEBP"}.get(suffix.lower(), "JPEG")
    Image.fromarray(smooth).save(path, kind, quality=95)
    edits, _ = read_results(tmp_path, {IDS[0]: (16, 12)}, allow_missing=False)
    assert np.abs(edits[IDS[0]].astype(int) - smooth).mean() < 8


def test_missing_results_are_listed_and_refused_unless_allowed(folder: Path) -> None:
    ids = [f"{number:012d}" for number in range(7)]
    with pytest.raises(ResultsError, match=r"no result for 7 \(000000000000, .*000000000004, \.\.\.\) of 8 bench ids"):
        find_results(folder, [*ids, IDS[0]], allow_missing=False)
    found = find_results(folder, [*ids, IDS[0]], allow_missing=True)
    assert list(found.paths) == [IDS[0]] and found.missing == ids
    assert found.extra_files == 2  # results of ids that this bench does not have


def test_extra_entries_are_counted_and_left_alone(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / f"{IDS[0]}.txt").write_text("a caption")
    (folder / "grid.png").write_bytes(b"not an image")
    (folder / "samples").mkdir()
    (folder / "samples" / f"{IDS[0]}.png").write_bytes(b"not an image")
    edits, found = read_results(folder, SIZES_PX, allow_missing=False)
    assert len(edits) == 3 and found.extra_files == 4


def test_two_files_of_one_id_are_refused(folder: Path) -> None:
    _write(folder, IDS[0], ".jpg")
    with pytest.raises(ResultsError, match=r"two results of 000000012345, 000000012345\.jpg and 000000012345\.png"):
        find_results(folder, IDS, allow_missing=True)


def test_no_folder_no_results(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a folder"):
        find_results(tmp_path / "nowhere", IDS, allow_missing=True)
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(ResultsError, match="is not a folder"):
        find_results(tmp_path / "file.png", IDS, allow_missing=True)
    with pytest.raises(
        ResultsError, match=r"none of its 1 entries is a result of this bench, such as 000000012345\.png"
    ):
        find_results(tmp_path, IDS, allow_missing=True)
    with pytest.raises(ValueError, match="twice"):
        find_results(tmp_path, ["a", "a"], allow_missing=True)


def _resaved(kind: str, mode: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.fromarray(_picture(IDS[0])).convert(mode).save(path, kind)

    return save


def _truncated(kind: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.fromarray(np.kron(_picture(IDS[0]), np.ones((8, 8, 1), np.uint8))).save(path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return save


def _half_transparent(path: Path) -> None:
    alpha = np.full((12, 16, 1), 255, np.uint8)
    alpha[0, 0] = 254
    Image.fromarray(np.concatenate([_picture(IDS[0]), alpha], axis=2)).save(path, "PNG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "empty file", id="empty"),
        pytest.param(lambda path: path.write_text("<html>quota exceeded"), "a web page", id="web page"),
        pytest.param(_truncated("PNG"), "", id="half a PNG"),
        pytest.param(_truncated("JPEG"), "the end of the JPEG is missing", id="half a JPEG"),
        pytest.param(_resaved("PNG", "L"), "stored as L", id="grey"),
        pytest.param(_resaved("PNG", "P"), "stored as P", id="palette"),
        pytest.param(_half_transparent, "partly transparent", id="alpha"),
    ],
)
def test_what_is_not_a_whole_rgb_picture_is_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / f"{IDS[0]}.png")
    with pytest.raises(ResultsError, match=rf"{IDS[0]}\.png: .*{message}"):
        read_results(folder, SIZES_PX, allow_missing=True)


def test_an_opaque_alpha_channel_is_dropped(folder: Path) -> None:
    _resaved("PNG", "RGBA")(folder / f"{IDS[0]}.png")
    edit = read_result(folder / f"{IDS[0]}.png", width_px=16, height_px=12)
    np.testing.assert_array_equal(edit, _picture(IDS[0]))


def test_another_size_is_refused_with_both(folder: Path) -> None:
    with pytest.raises(ResultsError, match=r"000000012345\.png: 16 x 12 px, but .* has 12 x 16 px") as caught:
        read_results(folder, SIZES_PX | {IDS[0]: (12, 16)}, allow_missing=True)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
