"""Extraction keeps order, follows the resize rule and does not depend on the batch size. No wheel needed."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbe.evaluate.features import RESIZE_RULE, extract
from pbe.model.backbone import EfficientNetLite


class OneConvolution(nn.Module):
    """Random 32 px patches to 1280 channels: the backbone's shapes at a thousandth of its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 1280, 32, stride=32)

    def extract_features(self, images: Tensor) -> Tensor:
        return self.patches(images)


@pytest.fixture(scope="module")
def backbone() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite(OneConvolution(), name="one_convolution", digest="0" * 16)


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (224, 224), (300, 500), (20, 10), (400, 100)]
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def test_rows_are_the_images_in_order(backbone: EfficientNetLite) -> None:
    images = _images()
    features = extract(backbone, images, batch_rows=2)
    assert features.shape == (5, 1280) and features.dtype == np.float64
    backwards = extract(backbone, images[::-1], batch_rows=2)
    np.testing.assert_allclose(backwards[::-1], features, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 3, 5, 99])
def test_the_batch_size_does_not_matter(backbone: EfficientNetLite, batch_rows: int) -> None:
    np.testing.assert_allclose(
        extract(backbone, _images(), batch_rows=batch_rows),
        extract(backbone, _images(), batch_rows=2),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("size", "interpolation"),
    [
        ((897, 900), cv2.INTER_AREA),
        ((896, 900), cv2.INTER_LINEAR),  # a quarter is not below a quarter
        ((64, 48), cv2.INTER_LINEAR),
        ((900, 100), cv2.INTER_LINEAR),
    ],
)
def test_the_resize_rule_is_the_documented_one(
    backbone: EfficientNetLite, size: tuple[int, int], interpolation: int
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    squashed = cv2.resize(image, (224, 224), interpolation=interpolation)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(squashed).permute(2, 0, 1)[None])
    np.testing.assert_allclose(extract(backbone, [image], batch_rows=1), expected.numpy(), atol=1e-5)
    assert "INTER_AREA" in RESIZE_RULE and "INTER_LINEAR" in RESIZE_RULE and str(backbone.input_px) in RESIZE_RULE


def test_a_cropped_view_is_accepted(backbone: EfficientNetLite) -> None:
    image = _images()[2]
    view = image[10:200:2, ::-1]
    np.testing.assert_allclose(
        extract(backbone, [view], batch_rows=1), extract(backbone, [view.copy()], batch_rows=1), atol=1e-6
    )


def test_no_images_give_no_rows(backbone: EfficientNetLite) -> None:
    assert extract(backbone, [], batch_rows=4).shape == (0, 1280)


def test_bad_input_is_refused(backbone: EfficientNetLite) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        extract(backbone, [np.zeros((8, 8, 3), np.float32)], batch_rows=1)
    with pytest.raises(ValueError, match="expected uint8"):
        extract(backbone, [np.zeros((8, 0, 3), np.uint8)], batch_rows=1)
    with pytest.raises(ValueError, match="batch_rows"):
        extract(backbone, [], batch_rows=0)
