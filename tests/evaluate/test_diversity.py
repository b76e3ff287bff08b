"""How far apart fills of other noise lie: known spreads, and order."""

import numpy as np
import pytest

from pbe.evaluate.metrics.diversity import feature_spread, pixel_spread

S, N, D = 4, 5, 7


def test_the_spread_is_the_mean_over_pairs_whatever_their_order() -> None:
    regions = np.random.default_rng(1).normal(size=(S, N, D))
    unit = regions / np.linalg.norm(regions, axis=2, keepdims=True)
    wanted = [np.mean([1 - unit[a, i] @ unit[b, i] for a in range(S) for b in range(a)]) for i in range(N)]
    np.testing.assert_allclose(feature_spread(regions), wanted)
    np.testing.assert_allclose(feature_spread(regions[::-1]), wanted)


def test_pixels_outside_the_hole_do_not_count() -> None:
    fills = np.zeros((2, 4, 4, 3), np.uint8)
    hole_mask = np.zeros((4, 4), np.uint8)
    hole_mask[:2] = 1
    fills[1, 2:] = 255
    assert pixel_spread(fills, hole_mask) == 0
    fills[1, :2] = 10
    assert pixel_spread(fills, hole_mask) == pytest.approx(np.std([0, 10], ddof=1))


def test_one_fill_or_no_hole_is_refused() -> None:
    with pytest.raises(ValueError, match="1 fill of each hole"):
        feature_spread(np.ones((1, N, D)))
    with pytest.raises(ValueError, match="1 fill of each hole"):
        pixel_spread(np.zeros((1, 2, 2, 3), np.uint8), np.ones((2, 2)))
    with pytest.raises(ValueError, match="hole is empty"):
        pixel_spread(np.zeros((2, 2, 2, 3), np.uint8), np.zeros((2, 2)))
