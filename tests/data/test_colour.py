"""Colour profiles: pictures of other colour spaces become sRGB, all others keep every level."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pbe.data.images import colour_note, decode, read_mode
from tests.icc import CMYK, GREY, SRGB, SRGB_BY_TABLE, WHITE, WIDE, profile

HEIGHT_PX, WIDTH_PX = 48, 80
ROWS, COLUMNS = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
PHOTO = Image.fromarray(np.stack([ROWS * 5, COLUMNS * 3, 250 - ROWS - COLUMNS], axis=2).astype(np.uint8))
# how each format is saved without changing a level, apart from JPEG and AVIF
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {},
}


def _saved(picture: Image.Image, kind: str, icc: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **FORMATS[kind], **({"icc_profile": icc} if icc else {}))
    return buffer.getvalue()


def _in_srgb(stored: np.ndarray, icc: bytes) -> np.ndarray:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(stored), opened, ImageCms.createProfile("sRGB")))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wide_gamut_becomes_srgb_and_an_srgb_profile_changes_no_level(kind: str) -> None:
    stored = decode(_saved(PHOTO, kind))
    data = _saved(PHOTO, kind, WIDE)
    np.testing.assert_array_equal(decode(data, convert=False), stored)
    assert np.abs(decode(data).astype(int) - _in_srgb(stored, WIDE)).max() <= 1
    assert np.abs(decode(data).astype(int) - stored).max() > 30
    assert "converted from" in colour_note(data)
    assert np.abs(_in_srgb(stored, SRGB_BY_TABLE).astype(int) - stored).max() == 1
    for same in (_saved(PHOTO, kind), _saved(PHOTO, kind, SRGB), _saved(PHOTO, kind, SRGB_BY_TABLE)):
        np.testing.assert_array_equal(decode(same), stored)
        assert colour_note(same) == ""


def test_a_profile_in_several_segments_is_read_in_their_order() -> None:
    data = _saved(PHOTO, "JPEG")
    parts = [WIDE[:150], WIDE[150:160], WIDE[160:]]
    segments = [b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part for number, part in enumerate(parts, start=1)]
    mixed = [b"\xff\xe2" + struct.pack(">H", 2 + len(segment)) + segment for segment in (segments[2], *segments[:2])]
    assert colour_note(data) == ""
    converted = decode(_saved(PHOTO, "JPEG", WIDE))
    assert (converted != decode(data)).any()
    np.testing.assert_array_equal(decode(data[:2] + b"".join(mixed) + data[2:]), converted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_greys_are_converted_from_their_own_profile(kind: str) -> None:
    grey = PHOTO.convert("L")
    out = decode(_saved(grey, kind, GREY))
    ramp = decode(_saved(Image.fromarray(np.full((8, 8), 55, np.uint8)), "PNG", GREY))
    assert (out == out[..., :1]).all()
    assert np.abs(ramp.astype(int) - 128).max() <= 1  # 55 / 255 of the light of white is level 128 of sRGB
    np.testing.assert_array_equal(decode(_saved(grey, kind, GREY), convert=False), decode(_saved(grey, kind)))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_from_their_own_profile(kind: str) -> None:
    inks = PHOTO.convert("CMYK")
    data = _saved(inks, kind, CMYK)
    assert read_mode(data) == "CMYK" and "converted" in colour_note(data)
    out, naive = decode(data).astype(int), decode(_saved(inks, kind))
    assert np.ptp(out, axis=2).max() <= 2 < np.ptp(naive, axis=2).max()


def test_a_picture_in_lab_is_its_picture() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = ImageCms.profileToProfile(PHOTO, srgb, lab, outputMode="LAB")
    assert picture is not None
    data = _saved(picture, "TIFF")
    assert np.abs(decode(data).astype(int) - np.asarray(PHOTO)).mean() < 2


@pytest.mark.parametrize(
    ("mode", "icc"),
    [
        ("RGB", b"no profile at all" * 20),
        ("RGB", WIDE[: len(WIDE) // 2]),
        ("RGB", WIDE[:200] + bytes(len(WIDE) - 200)),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        ("RGB", GREY),
        ("RGB", CMYK),
        ("RGB", profile(b"RGB ", b"XYZ ", WHITE, b"link")),
        ("L", CMYK),
        ("CMYK", WIDE),
    ],
    ids=["text", "half", "zeros", "lab", "grey", "inks", "link", "inks of grey", "rgb of inks"],
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_profile_that_does_not_fit_changes_nothing_and_is_told(kind: str, mode: str, icc: bytes) -> None:
    picture = PHOTO.convert(mode)
    data = _saved(picture, kind, icc)
    np.testing.assert_array_equal(decode(data), decode(_saved(picture, kind)))
    assert colour_note(data) == "its colour profile cannot be used; its colours are taken as sRGB"
