"""Data and learning rate against what upstream's code makes of the same draws, written here again from
ldm/data/open-images.py and ldm/lr_scheduler.py. What differs, pipelines/reporting/deviations.yaml lists. Edits:
test_protocols.py.
"""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pbe.data.boxes import Box, extended, square_window
from pbe.data.masks import bezier_ring, keep_mask_latent
from pbe.data.triplets import cut, plan_triplet
from pbe.train.worker import learning_rate
from tests.profiles import profile

CFG = profile("openimages").materialize
WIDTH_PX, HEIGHT_PX = 1024, 683


def _photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    return cv2.resize(coarse, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


def _resized(picture: np.ndarray, window: Box) -> np.ndarray:
    """T.Resize([512, 512]) of a tensor in torchvision 0.12: bilinear, without antialias."""
    crop = torch.from_numpy(picture[window.y0 : window.y1, window.x0 : window.x1]).float()
    planes = crop.permute(2, 0, 1)[None] if crop.ndim == 3 else crop[None, None]
    found = torch.nn.functional.interpolate(planes, (512, 512), mode="bilinear", antialias=False)[0]
    return found.permute(1, 2, 0).squeeze(2).numpy() if crop.ndim == 2 else found.permute(1, 2, 0).numpy()


def _kept(clean: np.ndarray) -> list[int]:
    """Points of a ring before its jitter that are not left out: x and y are new on their side."""
    kept: list[int] = []
    for side in np.split(np.arange(len(clean)), 4):
        xs: list[float] = []
        ys: list[float] = []
        for index in side:
            x, y = clean[index]
            if x not in xs and y not in ys:
                kept.append(int(index))
                xs, ys = [*xs, x], [*ys, y]
    return kept


def _keep_mask(ring: np.ndarray, window: Box) -> np.ndarray:
    canvas = Image.new("L", (WIDTH_PX, HEIGHT_PX), 255)
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in ring.tolist()], fill=0)
    return _resized(np.array(canvas), window) / 255


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("seed", range(12))
def test_a_triplet_is_upstreams_but_for_the_rims_of_its_holes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x0, y0 = (int(v) for v in rng.integers(0, (600, 400)))
    box = Box(x0, y0, x0 + int(rng.integers(120, 420)), y0 + int(rng.integers(110, 280)))
    size = {"width_px": WIDTH_PX, "height_px": HEIGHT_PX}
    plan = plan_triplet(box, **size, cfg=CFG, rng=np.random.default_rng(seed))
    draws = np.random.default_rng(seed)
    ext = extended(box, **size, extend_frac=CFG.box_extend_frac, rng=draws)
    window = square_window(ext, **size, shrink_frac=CFG.crop_shrink_frac, rng=draws).box
    state = draws.bit_generator.state
    ring = bezier_ring(box, ext, points_per_side=18, jitter_px=5, rng=draws)
    draws.bit_generator.state = state
    clean = bezier_ring(box, ext, points_per_side=18, jitter_px=0, rng=draws)

    photo = _photo()
    assert np.abs(cut(photo, plan.window, 512) - _resized(photo, window)).max() <= 1  # whole levels
    pad = plan.reference
    reference = cv2.resize(photo[pad.y0 : pad.y1, pad.x0 : pad.x1], (224, 224), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(cut(photo, pad, 224), reference)

    hole = np.zeros((HEIGHT_PX, WIDTH_PX), np.float32)
    hole[ext.y0 : ext.y1, ext.x0 : ext.x1] = 1
    theirs, ours = _resized(hole, window), plan.box_hole_mask > 0
    assert (ours != (theirs > 0.5))[theirs != 0.5].sum() <= 8  # at corners, where two rims meet
    assert ((theirs > 0) & (theirs < 1)).mean() < 0.01  # the rims
    latents = np.abs(keep_mask_latent(plan.box_hole_mask, 8)[0] - (1 - _cells(theirs)))
    assert latents.max() <= 0.5 and latents.mean() < 0.01

    ours = plan.bezier_hole_mask > 0
    assert _overlap(ours, _keep_mask(ring, window) < 0.5) > 0.98
    kept = _kept(clean)
    assert 40 <= len(kept) <= 64
    assert _overlap(ours, _keep_mask(ring[kept], window) < 0.5) > 0.93


def _cells(mask: np.ndarray) -> np.ndarray:
    """Resize of the 512 px mask to 64 x 64 cells."""
    planes = torch.from_numpy(mask)[None, None]
    return torch.nn.functional.interpolate(planes, (64, 64), mode="bilinear", antialias=False)[0, 0].numpy()


def test_the_learning_rate_is_upstreams_of_the_next_step() -> None:
    cfg = profile("openimages").train

    def upstream(step: int) -> float:
        f_start, warm_up_steps = 1e-6, 10_000
        return 1e-5 * ((1 - f_start) / warm_up_steps * step + f_start if step < warm_up_steps else 1.0)

    for step in (0, 1, 4_999, 9_998, 9_999, 10_000, 200_000):
        assert learning_rate(cfg, step) == pytest.approx(upstream(step + 1), rel=1e-9, abs=1e-11)  # a millionth of it
