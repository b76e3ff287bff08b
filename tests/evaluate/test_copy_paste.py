"""copy_paste_score is high on warped, recoloured and re-encoded copies of the reference, low on everything else."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.data import images
from pbe.evaluate.bench.baselines import copy_paste, poisson
from pbe.evaluate.metrics.copy_paste import copy_paste_score

COCO256 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco256"
REFERENCE_PX = 160
COPIES = ("pasted", "mirrored", "turned", "enlarged", "recoloured", "blurred", "jpeg", "mixed")
SMOOTH = ("one colour", "gradient", "black")


@pytest.fixture(scope="module")
def references() -> list[np.ndarray]:
    """Crops of real photos, each of another place."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed; install pbe[sample]")
    crops = []
    for photo in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()):
        for y in (0, photo.shape[0] - 180):
            for x in (10, photo.shape[1] - 190):
                crops.append(cv2.resize(photo[y : y + 180, x : x + 180], (REFERENCE_PX, REFERENCE_PX)))
    return crops


def _hole(side_px: int, rng: np.random.Generator) -> np.ndarray:
    hole_mask = np.zeros((side_px, side_px), np.uint8)
    height, width = (int(n) for n in rng.integers(max(10, side_px // 4), side_px * 7 // 10, 2))
    y, x = int(rng.integers(side_px - height)), int(rng.integers(side_px - width))
    if rng.random() < 0.5:
        hole_mask[y : y + height, x : x + width] = 1
        return hole_mask
    return cv2.ellipse(hole_mask, (x + width // 2, y + height // 2), (width // 2, height // 2), 0, 0, 360, 1, -1)


def _copy(reference: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The reference as another method might paste it."""
    turn, scale, flip, shift = 0.0, 1.0, 1.0, 0.0
    if kind in ("turned", "mixed"):
        turn = float(np.deg2rad(rng.uniform(8, 20) * rng.choice([-1, 1])))
    if kind in ("enlarged", "mixed"):
        scale = float(rng.uniform(1.1, 1.3))
    if kind in ("mirrored", "mixed"):
        flip, shift = -1.0, 5.0 * (kind == "mixed")
    centre = np.full(2, (REFERENCE_PX - 1) / 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.diag([flip, 1]) * scale
    warp = np.column_stack([matrix, centre - matrix @ centre + shift])
    copy = cv2.warpAffine(reference, warp, (REFERENCE_PX, REFERENCE_PX), borderMode=cv2.BORDER_REFLECT)
    if kind == "recoloured":
        return np.clip(copy * rng.uniform(0.7, 1.2, 3) + rng.uniform(-30, 30, 3), 0, 255).astype(np.uint8)
    if kind == "blurred":
        return cv2.GaussianBlur(copy, (0, 0), 0.015 * REFERENCE_PX)
    return copy


def _smooth(kind: str) -> np.ndarray:
    y, x = np.mgrid[:REFERENCE_PX, :REFERENCE_PX]
    if kind == "gradient":
        return np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)
    return np.full((REFERENCE_PX, REFERENCE_PX, 3), (150, 90, 40) if kind == "one colour" else 0, np.uint8)


def _edit(photo: np.ndarray, hole_mask: np.ndarray, fill: np.ndarray, kind: str) -> np.ndarray:
    side_px = hole_mask.shape[0]
    edit = copy_paste(cv2.resize(photo, (side_px, side_px), interpolation=cv2.INTER_AREA), hole_mask, fill)
    return images.decode(images.encode_jpeg(edit, 75)) if kind == "jpeg" else edit


def _scores(references: list[np.ndarray], kind: str, side_px: int) -> np.ndarray:
    """One score per reference. kind: one of COPIES or SMOOTH, "unrelated" or "same photo"."""
    out = []
    for index, reference in enumerate(references):
        rng = np.random.default_rng([side_px, index])
        hole_mask = _hole(side_px, rng)
        other = references[(index + 5) % len(references)]
        fill = {"unrelated": other, "same photo": references[index ^ 1]}.get(kind)
        if fill is None:
            fill = _smooth(kind) if kind in SMOOTH else _copy(reference, kind, rng)
        out.append(copy_paste_score(_edit(other, hole_mask, fill, kind), hole_mask, reference))
    return np.array(out)


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)


@pytest.mark.parametrize("side_px", [40, *(pytest.param(side_px, marks=pytest.mark.slow) for side_px in (64, 256))])
def test_copies_score_above_all_else(references: list[np.ndarray], side_px: int) -> None:
    unlike = np.concatenate([_scores(references, kind, side_px) for kind in ("unrelated", "same photo")])
    assert np.median(unlike) < 0.12
    for kind in COPIES:
        copies = _scores(references, kind, side_px)
        assert _auc(copies, unlike) > (0.9 if kind == "jpeg" else 0.95), kind  # JPEG takes what texture a sky has
        assert np.median(copies) > (0.95 if kind in ("pasted", "mirrored") else 0.6), kind
    for kind in SMOOTH:
        assert _scores(references, kind, side_px).max() < 0.2, kind


def _coco_boxes(count: int) -> list[tuple[str, str, np.ndarray]]:
    """(photo, class, crop) of boxes of moderate size, evenly spaced through the list."""
    with (COCO256 / "boxes_openimages_train.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = [[float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax")] for row in rows]
    good = [index for index, (x0, x1, y0, y1) in enumerate(ends) if 0.02 <= (x1 - x0) * (y1 - y0) <= 0.5]
    out = []
    for index in (good[int(at)] for at in np.linspace(0, len(good) - 1, count)):
        data = (COCO256 / "images" / "train2017" / f"{rows[index]['ImageID']}.jpg").read_bytes()
        photo = images.decode(data)
        x0, x1, y0, y1 = (int(end * photo.shape[axis]) for end, axis in zip(ends[index], (1, 1, 0, 0), strict=True))
        crop = cv2.resize(photo[y0:y1, x0:x1], (REFERENCE_PX, REFERENCE_PX), interpolation=cv2.INTER_AREA)
        out.append((rows[index]["ImageID"], rows[index]["LabelName"], crop))
    return out


@pytest.mark.skipif(not COCO256.is_dir(), reason=f"needs the photos of coco256 at {COCO256}")
def test_copies_score_above_true_content_of_the_same_class() -> None:
    boxes = _coco_boxes(60)
    copies, others = [], []
    for index, (photo, label, reference) in enumerate(boxes):
        rng = np.random.default_rng(index)
        hole_mask = _hole(64, rng)
        alike = [crop for other, kind, crop in boxes if kind == label and other != photo]
        fill = alike[0] if alike else boxes[(index + 30) % len(boxes)][2]
        background = boxes[(index + 17) % len(boxes)][2]
        kind = COPIES[index % len(COPIES)]
        copies.append(
            copy_paste_score(_edit(background, hole_mask, _copy(reference, kind, rng), kind), hole_mask, reference)
        )
        others.append(copy_paste_score(_edit(background, hole_mask, fill, ""), hole_mask, reference))
    assert _auc(np.array(copies), np.array(others)) > 0.97
    assert np.median(others) < 0.12


def test_blending_hides_a_copy_only_a_little(references: list[np.ndarray]) -> None:
    hole_mask = np.zeros((64, 64), np.uint8)
    hole_mask[10:50, 12:44] = 1
    photo = cv2.resize(references[9], (64, 64), interpolation=cv2.INTER_AREA)
    scores = [copy_paste_score(poisson(photo, hole_mask, reference), hole_mask, reference) for reference in references]
    assert np.median(scores) > 0.7


def test_a_copy_that_keeps_the_references_shape_is_found(references: list[np.ndarray]) -> None:
    """Cut to the hole instead of squeezed into it."""
    hole_mask = np.zeros((64, 64), np.uint8)
    hole_mask[20:48, 2:62] = 1
    for reference in references[:4]:
        photo = np.zeros((64, 64, 3), np.uint8)
        photo[20:48, 2:62] = cv2.resize(reference, (60, 60), interpolation=cv2.INTER_AREA)[16:44]
        assert copy_paste_score(photo, hole_mask, reference) > 0.8


def test_a_trace_of_a_copy_is_none(references: list[np.ndarray]) -> None:
    """A fill of almost one colour correlates with whatever left its last levels."""
    hole_mask = np.zeros((64, 64), np.uint8)
    hole_mask[10:50, 12:44] = 1
    for reference in references[:4]:
        trace = np.round(128 + 0.02 * (reference - 128.0)).astype(np.uint8)
        faint = np.full((64, 64, 3), 128, np.uint8)
        assert copy_paste_score(copy_paste(faint, hole_mask, trace), hole_mask, reference) < 0.4


def test_only_the_hole_counts_and_nothing_is_random(references: list[np.ndarray]) -> None:
    hole_mask = _hole(64, np.random.default_rng(3))
    first, other = references[0], references[7]
    edit = copy_paste(cv2.resize(other, (64, 64)), hole_mask, first)
    elsewhere = copy_paste(cv2.resize(references[11], (64, 64)), hole_mask, first)
    score = copy_paste_score(edit, hole_mask, first)
    assert score == copy_paste_score(edit, hole_mask * np.uint8(255), first)
    assert score == pytest.approx(copy_paste_score(elsewhere, hole_mask, first), abs=1e-6)


def test_degenerate_input_has_a_score(references: list[np.ndarray]) -> None:
    edit = cv2.resize(references[0], (64, 64))
    for area in (np.s_[5:6, 7:8], np.s_[5:6, 7:60], np.s_[5:9, 7:9], np.s_[:, :], np.s_[::9, ::9]):
        hole_mask = np.zeros((64, 64), np.uint8)
        hole_mask[area] = 1
        assert 0 <= copy_paste_score(edit, hole_mask, references[0]) <= 1
        assert 0 <= copy_paste_score(edit, hole_mask, references[1][:3, :90]) <= 1
        assert copy_paste_score(edit, hole_mask, np.full((1, 1, 3), 9, np.uint8)) < 0.01
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert copy_paste_score(noise, np.ones((64, 64), np.uint8), references[0]) < 0.2


def test_bad_input_is_refused(references: list[np.ndarray]) -> None:
    edit, hole_mask = references[0], np.ones((REFERENCE_PX, REFERENCE_PX), np.uint8)
    with pytest.raises(ValueError, match="empty"):
        copy_paste_score(edit, hole_mask * 0, edit)
    with pytest.raises(ValueError, match="does not match"):
        copy_paste_score(edit, hole_mask[:8], edit)
    with pytest.raises(ValueError, match="reference: float64"):
        copy_paste_score(edit, hole_mask, edit / 255)
    with pytest.raises(ValueError, match="edit: uint8"):
        copy_paste_score(edit[..., 0], hole_mask, edit)
