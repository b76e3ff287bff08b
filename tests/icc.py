"""Colour profiles that tests make: sRGB, a wide gamut, a grey of gamma 1, and inks."""

import struct

import numpy as np
from PIL import ImageCms

HEADER_BYTES = 128
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04, section 6)."""
    body, table = b"", b""
    start = HEADER_BYTES + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    white = struct.pack(">3i", 63190, 65536, 54061)
    head = b"\0\0\0\0\x02\x40\0\0" + kind + space + pcs + bytes(12) + b"acsp" + bytes(28) + white
    head = struct.pack(">I", start + len(body)) + head
    return head.ljust(HEADER_BYTES, b"\0") + struct.pack(">I", len(tags)) + table + body


WHITE = {b"wtpt": _xyz(0.9642, 1, 0.8249)}
# primaries of Adobe RGB (1998), adapted to D50
WIDE = profile(
    b"RGB ",
    b"XYZ ",
    {
        **WHITE,
        b"rXYZ": _xyz(0.6097, 0.3111, 0.0195),
        b"gXYZ": _xyz(0.2053, 0.6257, 0.0609),
        b"bXYZ": _xyz(0.1492, 0.0632, 0.7446),
        **{name: _gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")},
    },
)
# sRGB of another maker, with other rounding: it changes some levels by one
_LIGHT = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.linspace(0, 1, 256)]
_CURVE = b"curv\0\0\0\0" + struct.pack(">I256H", 256, *(round(65000 * light) for light in _LIGHT))
SRGB_BY_TABLE = profile(
    b"RGB ",
    b"XYZ ",
    {
        **WHITE,
        b"rXYZ": _xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": _xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": _xyz(0.1431, 0.0606, 0.7141),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _CURVE),
    },
)
GREY = profile(b"GRAY", b"XYZ ", {**WHITE, b"kTRC": _gamma(1.0)})


def _inks() -> bytes:
    """Of CMYK: a table in which every ink only darkens, so that all colours are greys."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    light = np.clip(255 - inks @ (60, 60, 60, 255), 0, 255)
    lab = np.stack([light, np.full(16, 128), np.full(16, 128)], axis=1).astype(np.uint8)
    line = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    return profile(b"CMYK", b"Lab ", {**WHITE, b"A2B0": table + line * 4 + lab.tobytes() + line * 3}, b"prtr")


CMYK = _inks()
