"""One image backend: RGB in, RGB out, pixels as stored, and one clear error for bytes that are no image."""

import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbe.data.images import ImageError, decode, encode_jpeg, encode_png, resize


def _noise(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3)).astype(np.uint8)


def _smooth(height_px: int, width_px: int) -> np.ndarray:
    rows, columns = np.mgrid[:height_px, :width_px]
    return np.stack([rows * 3 % 200, columns * 2 % 200, (rows + columns) % 200], axis=2).astype(np.uint8)


@settings(max_examples=40)
@given(height_px=st.integers(1, 40), width_px=st.integers(1, 40), seed=st.integers(0, 9))
def test_png_is_lossless(height_px: int, width_px: int, seed: int) -> None:
    image = _noise(height_px, width_px, seed)
    np.testing.assert_array_equal(decode(encode_png(image)), image)


def test_jpeg_is_close_and_red_stays_red() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250
    for data in (encode_jpeg(image, 95), encode_png(image)):
        red, green, blue = decode(data).reshape(-1, 3).mean(0)
        assert red > 240 and green < 10 and blue < 10
    smooth = _smooth(60, 60)
    errors = [np.abs(decode(encode_jpeg(smooth, quality)).astype(int) - smooth).mean() for quality in (30, 95, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1


def test_jpeg_keeps_full_colour_resolution() -> None:
    """4:4:4: the frame header gives each of the three components one sample per pixel."""
    data = encode_jpeg(_noise(16, 16), 95)
    frame = data.index(b"\xff\xc0")
    components = data[frame + 9]
    assert components == 3
    assert [data[frame + 11 + 3 * index] for index in range(3)] == [0x11, 0x11, 0x11]


def test_grey_becomes_three_equal_channels_and_alpha_is_dropped() -> None:
    grey = _noise(9, 7)[..., 0]
    np.testing.assert_array_equal(
        decode(cv2.imencode(".png", grey)[1].tobytes()), np.repeat(grey[..., None], 3, axis=2)
    )
    image = _noise(9, 7)
    with_alpha = np.dstack([image[..., ::-1], np.full((9, 7), 3, np.uint8)])
    np.testing.assert_array_equal(decode(cv2.imencode(".png", with_alpha)[1].tobytes()), image)


def test_the_exif_orientation_is_not_applied() -> None:
    """OpenImages' boxes match the stored file. Orientation 6 means: turn right by 90 degrees to view."""
    data = encode_jpeg(_smooth(40, 20), 95)
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 0)
    body = b"Exif\0\0" + tiff
    tagged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    viewed = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert viewed.shape[:2] == (20, 40)  # the tag is one that OpenCV honours when asked
    np.testing.assert_array_equal(decode(tagged), decode(data))


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"not an image" * 20, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", encode_png(_noise(30, 30))[:400]],
    ids=["empty", "one byte", "text", "jpeg marker", "png magic", "truncated png"],
)
def test_bytes_that_are_no_image_give_one_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value)


@given(
    width_px=st.integers(1, 50), height_px=st.integers(1, 50), to_width=st.integers(1, 50), to_height=st.integers(1, 50)
)
@settings(max_examples=100)
def test_resizing_gives_the_size_asked_for_and_keeps_a_plain_colour(
    width_px: int, height_px: int, to_width: int, to_height: int
) -> None:
    image = np.full((height_px, width_px, 3), (7, 130, 255), np.uint8)
    out = resize(image, width_px=to_width, height_px=to_height)
    assert out.shape == (to_height, to_width, 3) and out.dtype == np.uint8
    assert (out == (7, 130, 255)).all()


def test_shrinking_averages_areas() -> None:
    image = _noise(24, 36)
    blocks = image.reshape(8, 3, 9, 4, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(resize(image, width_px=9, height_px=8), blocks, atol=0.51)


def test_growing_interpolates_between_pixel_centres() -> None:
    image = np.array([[[0] * 3, [200] * 3]], np.uint8)
    assert resize(image, width_px=4, height_px=1)[0, :, 0].tolist() == [0, 50, 150, 200]


def test_the_same_size_is_the_same_image() -> None:
    image = _noise(13, 21)
    np.testing.assert_array_equal(resize(image, width_px=21, height_px=13), image)
