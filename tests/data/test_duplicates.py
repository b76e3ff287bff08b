"""Copies of a photo are found, other photos and flat ones are not, and all machines find the same."""

import cv2
import numpy as np
import pytest

from pbe.data import images
from pbe.data.descriptor import descriptor
from pbe.data.duplicates import HeldOut
from pbe.data.schema import DESCRIPTOR_BYTES


def _photo(seed: int) -> np.ndarray:
    """(300, 400, 3): random shapes over a bright sky and dark ground, which alone must not make two photos alike."""
    rng = np.random.default_rng(seed)
    photo = np.full((300, 400, 3), 215, np.uint8)
    photo[160:] = 50
    for _ in range(14):
        x, y, radius = (int(rng.integers(0, high)) for high in (400, 300, 70))
        cv2.circle(photo, (x, y), 15 + radius, [int(level) for level in rng.integers(0, 256, 3)], -1)
    return photo


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    [found] = HeldOut([("other", descriptor(other))]).nearest([descriptor(one)])
    assert found is not None and found.image_id == "other"
    return found.similarity


COPIES = {
    "compressed": lambda photo: images.decode(images.encode_jpeg(photo, 30)),
    "halved": lambda photo: images.resize(photo, width_px=200, height_px=150),
    "cropped by 3 %": lambda photo: photo[4:-5, 6:-6],
    "brighter": lambda photo: np.clip(photo * 1.15, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_more_alike_than_any_other_photo(name: str) -> None:
    others = HeldOut((f"photo{seed}", descriptor(_photo(seed))) for seed in range(1, 40))
    for seed in range(40, 50):
        assert _similarity(COPIES[name](_photo(seed)), _photo(seed)) > 0.9
    found = list(others.nearest([descriptor(_photo(seed)) for seed in range(50, 90)]))
    assert max(near.similarity for near in found if near) < 0.85


def test_a_flat_photo_resembles_nothing_not_even_another() -> None:
    rng = np.random.default_rng(0)
    flat = [np.clip(128 + rng.normal(0, 8, (200, 300, 3)), 0, 255).astype(np.uint8) for _ in range(2)]
    assert descriptor(flat[0]) == bytes(DESCRIPTOR_BYTES)
    held_out = HeldOut([("flat", descriptor(flat[0])), ("photo", descriptor(_photo(1)))])
    assert held_out.ids == ["photo"]
    assert list(held_out.nearest([descriptor(flat[1])])) == [None]


def test_nothing_is_held_out() -> None:
    assert list(HeldOut([]).nearest([descriptor(_photo(1))] * 3)) == [None] * 3


def test_the_nearest_is_found_among_many_whatever_their_order() -> None:
    rng = np.random.default_rng(3)
    stored = [
        (f"id{number:04d}", rng.integers(-60, 61, DESCRIPTOR_BYTES).astype(np.int8).tobytes()) for number in range(3000)
    ]
    asked = [data for _, data in stored[::3]] + [rng.integers(-60, 61, DESCRIPTOR_BYTES).astype(np.int8).tobytes()]
    held_out, shuffled = HeldOut(stored), HeldOut([stored[index] for index in rng.permutation(3000)])
    found = list(held_out.nearest(asked))
    assert [near.image_id for near in found[:-1] if near] == [name for name, _ in stored[::3]]
    assert held_out.digest == shuffled.digest and list(shuffled.nearest(asked)) == found
    vectors = np.stack([np.frombuffer(data, np.int8).astype(np.int64) for _, data in stored])
    last = np.frombuffer(asked[-1], np.int8).astype(np.int64)
    cosines = (vectors @ last) / np.sqrt((vectors**2).sum(1)) / np.sqrt((last**2).sum())
    assert found[-1] is not None and found[-1].image_id == stored[int(cosines.argmax())][0]
    assert found[-1].similarity == pytest.approx(cosines.max(), abs=1e-12)
