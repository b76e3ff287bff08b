"""A triplet shows its box: in the crop, under both holes, in the reference; and it depends on its arguments only."""

from dataclasses import dataclass

import numpy as np
import pytest

from pbe.data.boxes import Box
from pbe.data.settings import MaterializeConfig
from pbe.data.triplets import box_order, cut, plan_triplet, reference_area

CFG = MaterializeConfig(
    image_px=32,
    slots=1,
    reference_px=24,
    reference_pad_px=10,
    box_extend_frac=0.4,
    crop_shrink_frac=0.6,
    bezier_points_per_side=18,
    bezier_jitter_px=5,
)


@dataclass(frozen=True)
class Triplet:
    source: np.ndarray
    box_hole_mask: np.ndarray
    bezier_hole_mask: np.ndarray
    reference: np.ndarray
    box_px: tuple[float, float, float, float]


def cut_triplet(image: np.ndarray, box: Box, *, cfg: MaterializeConfig, rng: np.random.Generator) -> Triplet:
    height_px, width_px = image.shape[:2]
    plan = plan_triplet(box, width_px=width_px, height_px=height_px, cfg=cfg, rng=rng)
    return Triplet(
        source=cut(image, plan.window, cfg.image_px),
        box_hole_mask=plan.box_hole_mask,
        bezier_hole_mask=plan.bezier_hole_mask,
        reference=cut(image, plan.reference, cfg.reference_px),
        box_px=plan.box_px,
    )


def cut_reference(image: np.ndarray, box: Box, *, cfg: MaterializeConfig) -> np.ndarray:
    area = reference_area(box, width_px=image.shape[1], height_px=image.shape[0], cfg=cfg)
    return cut(image, area, cfg.reference_px)


def _marked(box: Box, width_px: int, height_px: int) -> np.ndarray:
    """Red inside the box, dark elsewhere."""
    image = np.full((height_px, width_px, 3), 20, np.uint8)
    image[box.y0 : box.y1, box.x0 : box.x1] = (220, 20, 20)
    return image


def _random(count: int, seed: int) -> list[tuple[np.ndarray, Box, Triplet]]:
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        width_px, height_px = (int(side) for side in rng.choice([1, 2, 9, 40, 64, 130], 2))
        xs, ys = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width_px, height_px))
        box = Box(int(xs[0]), int(ys[0]), int(xs[1]), int(ys[1]))
        image = _marked(box, width_px, height_px)
        out.append((image, box, cut_triplet(image, box, cfg=CFG, rng=rng)))
    return out


def _inner(low: float, high: float, photo_px: int) -> slice:
    """Crop pixels between low and high which show `photo_px` pixels, less those that the resize blends."""
    blend = int(np.ceil((high - low) / photo_px / 2)) + 1
    start = int(np.ceil(low)) + blend
    return slice(start, max(int(np.floor(high)) - blend, start))


def test_sizes_types_and_holes_of_any_photo_and_box() -> None:
    for image, _, triplet in _random(500, seed=1):
        assert triplet.source.shape == (32, 32, 3) and triplet.source.dtype == np.uint8
        assert triplet.reference.shape == (24, 24, 3) and triplet.reference.dtype == np.uint8
        for hole_mask in (triplet.box_hole_mask, triplet.bezier_hole_mask):
            assert hole_mask.shape == (32, 32) and hole_mask.dtype == np.uint8
            assert set(np.unique(hole_mask)) <= {0, 1} and hole_mask.any()
        x0, y0, x1, y1 = triplet.box_px
        assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 32, (image.shape, triplet.box_px)


def test_the_box_is_where_box_px_says_and_the_box_hole_covers_it() -> None:
    shown = 0
    for _, box, triplet in _random(500, seed=2):
        x0, y0, x1, y1 = triplet.box_px
        rows, columns = _inner(y0, y1, box.height_px), _inner(x0, x1, box.width_px)
        assert (triplet.source[rows, columns] == (220, 20, 20)).all()
        assert triplet.box_hole_mask[rows, columns].all()
        shown += triplet.source[rows, columns].size > 0
        red = triplet.source[..., 0] > 120
        red[max(int(y0) - 1, 0) : int(y1) + 2, max(int(x0) - 1, 0) : int(x1) + 2] = False  # half red at its edge
        assert not red.any()
    assert shown > 100


def test_the_whole_triplet_is_a_function_of_photo_box_and_generator() -> None:
    image, box = np.random.default_rng(0).integers(0, 256, (130, 90, 3)).astype(np.uint8), Box(20, 40, 60, 80)
    one, again, other = (cut_triplet(image, box, cfg=CFG, rng=np.random.default_rng(seed)) for seed in (7, 7, 8))
    for name in ("source", "box_hole_mask", "bezier_hole_mask", "reference"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert one.box_px == again.box_px != other.box_px
    np.testing.assert_array_equal(one.reference, other.reference)  # clean: no randomness


def test_both_holes_are_cut_for_the_same_crop() -> None:
    """Without extension and jitter the Bezier shape is the box less its corners."""
    cfg = CFG.model_copy(update={"box_extend_frac": 0.0, "bezier_jitter_px": 0})
    for seed in range(100):
        rng = np.random.default_rng(seed)
        box = Box(*(int(v) for v in np.concatenate([rng.integers(0, 40, 2), rng.integers(60, 100, 2)])))
        triplet = cut_triplet(_marked(box, 130, 100), box, cfg=cfg, rng=rng)
        rectangle, shape = triplet.box_hole_mask, triplet.bezier_hole_mask
        grown = np.pad(rectangle, 1)
        grown = np.max([grown[dy : dy + 32, dx : dx + 32] for dy in range(3) for dx in range(3)], axis=0)
        assert not (shape & ~grown & 1).any()
        assert shape.sum() > 0.85 * rectangle.sum()


def test_without_extension_the_hole_has_the_size_of_the_box() -> None:
    cfg = CFG.model_copy(update={"box_extend_frac": 0.0, "crop_shrink_frac": 0.0})
    triplet = cut_triplet(
        _marked(Box(8, 16, 40, 56), 64, 64), Box(8, 16, 40, 56), cfg=cfg, rng=np.random.default_rng(0)
    )
    assert triplet.box_px == (4.0, 8.0, 20.0, 28.0)
    expected = np.zeros((32, 32), np.uint8)
    expected[8:28, 4:20] = 1
    np.testing.assert_array_equal(triplet.box_hole_mask, expected)


def test_a_small_box_is_cut_at_its_own_size_as_from_a_photo_of_that_size() -> None:
    """The crop is the square around the box, and the hole grows in it alone."""
    cfg, box, sides = CFG.model_copy(update={"context_factor": 2.0}), Box(300, 200, 340, 230), set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        plan = plan_triplet(box, width_px=640, height_px=480, cfg=cfg, rng=rng)
        assert plan.window.contains(box) and (plan.window.width_px, plan.window.height_px) == (80, 80)
        x0, y0, x1, y1 = plan.box_px
        assert (x1 - x0, y1 - y0) == pytest.approx((16, 12))  # half of the crop's 32 px
        inner = box.moved(-plan.window.x0, -plan.window.y0)
        again = np.random.default_rng(seed)
        again.integers(261, 301), again.integers(151, 201)  # the place of the square
        as_photo = plan_triplet(inner, width_px=80, height_px=80, cfg=CFG, rng=again)
        np.testing.assert_array_equal(plan.box_hole_mask, as_photo.box_hole_mask)
        np.testing.assert_array_equal(plan.bezier_hole_mask, as_photo.bezier_hole_mask)
        assert plan.reference == reference_area(box, width_px=640, height_px=480, cfg=CFG)
        sides.add((plan.window.x0, plan.window.y0))
    assert len(sides) > 40


@pytest.mark.parametrize("box", [Box(100, 30, 420, 300), Box(0, 0, 640, 20)], ids=["large", "wider than high"])
def test_a_large_box_is_cut_as_without_context_factor(box: Box) -> None:
    for seed in range(20):
        one, two = (
            plan_triplet(box, width_px=640, height_px=480, cfg=cfg, rng=np.random.default_rng(seed))
            for cfg in (CFG, CFG.model_copy(update={"context_factor": 2.0}))
        )
        assert (one.window, one.box_px) == (two.window, two.box_px)
        np.testing.assert_array_equal(one.bezier_hole_mask, two.bezier_hole_mask)


def test_holes_keep_their_size_on_average_whatever_the_crop() -> None:
    """A crop pixel is hole when at least half of it is: rounding neither grows nor shrinks holes."""
    cfg, ratios = CFG.model_copy(update={"box_extend_frac": 0.0}), []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        box = Box(*(int(v) for v in np.concatenate([rng.integers(20, 60, 2), rng.integers(80, 120, 2)])))
        triplet = cut_triplet(_marked(box, 190, 150), box, cfg=cfg, rng=rng)
        x0, y0, x1, y1 = triplet.box_px
        ratios.append(triplet.box_hole_mask.sum() / ((x1 - x0) * (y1 - y0)))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def test_a_sliver_thinner_than_a_crop_pixel_still_leaves_a_hole() -> None:
    cfg = CFG.model_copy(update={"box_extend_frac": 0.0, "bezier_jitter_px": 0, "crop_shrink_frac": 0.0})
    box = Box(300, 5, 301, 6)
    triplet = cut_triplet(_marked(box, 640, 640), box, cfg=cfg, rng=np.random.default_rng(0))
    for hole_mask in (triplet.box_hole_mask, triplet.bezier_hole_mask):
        assert hole_mask.sum() == 1 and hole_mask[0, 15] == 1


def test_a_squashed_photo_keeps_its_box_in_place() -> None:
    """The box touches the left border of a wide photo, so the whole photo is squashed: x shrinks four times as much."""
    box = Box(0, 8, 64, 24)
    triplet = cut_triplet(_marked(box, 128, 32), box, cfg=CFG, rng=np.random.default_rng(0))
    assert triplet.box_px == (0.0, 8.0, 16.0, 24.0)


@pytest.mark.parametrize("box", [Box(0, 0, 20, 30), Box(80, 70, 100, 90), Box(40, 40, 41, 41), Box(0, 0, 100, 90)])
def test_the_reference_is_the_padded_box_clamped_to_the_photo_and_squashed(box: Box) -> None:
    image = np.random.default_rng(1).integers(0, 256, (90, 100, 3)).astype(np.uint8)
    clamped = image[max(box.y0 - 10, 0) : box.y1 + 10, max(box.x0 - 10, 0) : box.x1 + 10]
    cfg = CFG.model_copy(update={"reference_px": 5})
    got = cut_reference(image, box, cfg=cfg)
    blocks = [np.array_split(rows, 5, axis=1) for rows in np.array_split(clamped.astype(float), 5, axis=0)]
    if clamped.shape[0] % 5 == 0 and clamped.shape[1] % 5 == 0:  # area averaging is then the blocks' means
        np.testing.assert_allclose(got, [[block.mean((0, 1)) for block in row] for row in blocks], atol=1)
    np.testing.assert_array_equal(got, cut_reference(clamped, Box(0, 0, *clamped.shape[1::-1]), cfg=cfg))


def test_without_padding_the_reference_shows_the_box_alone() -> None:
    box = Box(13, 21, 50, 60)
    reference = cut_reference(_marked(box, 100, 90), box, cfg=CFG.model_copy(update={"reference_pad_px": 0}))
    assert (reference == (220, 20, 20)).all()
    padded = cut_reference(_marked(box, 100, 90), box, cfg=CFG)
    assert (padded[0] == 20).all() and (padded[12, 12] == (220, 20, 20)).all()


def test_box_order_is_a_permutation_that_depends_on_the_generator() -> None:
    orders = {tuple(box_order(5, np.random.default_rng(seed)).tolist()) for seed in range(50)}
    assert all(sorted(order) == list(range(5)) for order in orders) and len(orders) > 20
