"""Features of pictures: one for each, finite, and an error that names the picture."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pbe.data.schema import FEATURES
from pbe.evaluate.features.crops import Crop, square
from pbe.evaluate.features.extractors import Preprocessing
from pbe.evaluate.features.tables import FeatureTable, extract


class _Extractor:
    name = digest = resize_rule = "extractor"
    matches_resolution = paper = False

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        return np.array([[float(image.mean()), np.nan if image.max() == 255 else 1.0] for image in images])


def _view(key: str, value: int) -> Crop:
    return Crop(key, "whole", "whole", np.full((4, 4, 3), value, np.uint8))


def test_a_picture_whose_features_are_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"extractor gives values that are not finite for b\.png \(whole\)"):
        extract([_view("a.png", 1), _view("b.png", 255)], _Extractor(), batch_rows=4)


def test_real_images_are_squared_as_by_upstreams_script() -> None:
    """scripts/create_square_gt_for_fid.py, written again: the longer side is rounded down, the offset to even."""
    photo = np.random.default_rng(0).integers(0, 256, (427, 640, 3)).astype(np.uint8)
    whole = np.array(Image.fromarray(photo).resize((767, 512), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(square(photo, 512), whole[:, 128 : 128 + 512])


def test_two_pictures_of_one_name_are_not_silently_one() -> None:
    rows = [{"key": "a.png", "view": "whole", "vector": np.full(2, value, "<f4").tobytes()} for value in (1, 2)]
    with pytest.raises(ValueError, match="1 rows repeat the key and view of another"):
        FeatureTable([pa.Table.from_pylist([row], schema=FEATURES) for row in rows])
