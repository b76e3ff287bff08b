"""Orientation from wherever programs write it, megabytes of text, and formats that outside programs would read."""

import ast
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from pbe.data.images import ImageError, decode, open_picture, read_alpha, read_header
from pbe.places import repo_root

HEIGHT_PX, WIDTH_PX = 48, 80
ROWS, COLUMNS = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
PHOTO = np.stack([ROWS * 5, COLUMNS * 3, 250 - ROWS - COLUMNS], axis=2).astype(np.uint8)
ALPHA = np.where(COLUMNS < 20, 0, 255).astype(np.uint8)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
XMP_ELEMENT = XMP.replace(b' tiff:Orientation="6"/>', b"><tiff:Orientation>6</tiff:Orientation></rdf:Description>")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _saved(kind: str, mode: str = "RGB", **more: Any) -> bytes:
    picture = Image.fromarray(np.dstack([PHOTO, ALPHA]) if mode == "RGBA" else PHOTO)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(*before: bytes, after: bytes = b"", mode: str = "RGB") -> bytes:
    """A PNG with chunks before or after its pixels."""
    data = _saved("PNG", mode)
    header = 8 + 25
    return data[:header] + b"".join(before) + data[header:-12] + after + data[-12:]


def _raw(name: bytes, block: bytes) -> bytes:
    """As ImageMagick writes a block into a text chunk."""
    digits = block.hex().encode()
    lines = b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return b"\n%s\n%8d\n%s\n" % (name, len(block), lines)


def _packed(keyword: bytes, text: bytes) -> bytes:
    return _chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))


def _itxt(text: bytes, packed: int) -> bytes:
    head = b"XML:com.adobe.xmp\0" + bytes([packed, 0]) + b"en\0key\0"
    return _chunk(b"iTXt", head + (zlib.compress(text) if packed else text))


EXIF = _exif(6)
TIFF_BLOCK = EXIF.removeprefix(b"Exif\0\0")
STATED_6 = {
    "JPEG exif": _saved("JPEG", quality=95, exif=EXIF),
    "JPEG xmp": _saved("JPEG", quality=95, xmp=XMP),
    "JPEG exif before xmp": _saved("JPEG", quality=95, exif=EXIF, xmp=XMP.replace(b'"6"', b'"3"')),
    "JPEG exif nonsense, xmp": _saved("JPEG", quality=95, exif=_exif(77), xmp=XMP),
    "PNG eXIf": _png(_chunk(b"eXIf", TIFF_BLOCK)),
    "PNG eXIf after the pixels": _png(after=_chunk(b"eXIf", TIFF_BLOCK)),
    "PNG eXIf before xmp": _png(_itxt(XMP.replace(b'"6"', b'"8"'), 0), _chunk(b"eXIf", TIFF_BLOCK)),
    "PNG xmp": _png(_itxt(XMP, 0)),
    "PNG xmp packed": _png(_itxt(XMP, 1)),
    "PNG xmp element": _png(_itxt(XMP_ELEMENT, 0)),
    "PNG xmp after the pixels": _png(after=_itxt(XMP, 1)),
    "PNG raw exif": _png(_packed(b"Raw profile type exif", _raw(b"exif", EXIF))),
    "PNG raw exif as text": _png(_chunk(b"tEXt", b"Raw profile type exif\0" + _raw(b"exif", EXIF))),
    "PNG raw APP1": _png(_packed(b"Raw profile type APP1", _raw(b"generic profile", EXIF))),
    "PNG raw APP1 with xmp": _png(
        _packed(b"Raw profile type APP1", _raw(b"app1", b"http://ns.adobe.com/xap/1.0/\0" + XMP))
    ),
    "PNG raw xmp": _png(after=_packed(b"Raw profile type xmp", _raw(b"xmp", XMP))),
    "WEBP exif": _saved("WEBP", lossless=True, exif=EXIF),
    "WEBP xmp": _saved("WEBP", lossless=True, xmp=XMP),
    "AVIF exif": _saved("AVIF", quality=100, exif=EXIF),
    "TIFF xmp": _saved("TIFF", tiffinfo={700: XMP}),
    "PNG eXIf, alpha": _png(_chunk(b"eXIf", TIFF_BLOCK), mode="RGBA"),
    "PNG eXIf after the pixels, alpha": _png(after=_chunk(b"eXIf", TIFF_BLOCK), mode="RGBA"),
    "PNG xmp, alpha": _png(_itxt(XMP, 0), mode="RGBA"),
    "PNG raw exif, alpha": _png(_packed(b"Raw profile type exif", _raw(b"exif", EXIF)), mode="RGBA"),
    "PNG raw APP1, alpha": _png(_packed(b"Raw profile type APP1", _raw(b"app1", EXIF)), mode="RGBA"),
    "WEBP xmp, alpha": _saved("WEBP", "RGBA", lossless=True, exact=True, xmp=XMP),
    "TIFF tag, alpha": _saved("TIFF", "RGBA", exif=EXIF),
    "TIFF xmp, alpha": _saved("TIFF", "RGBA", tiffinfo={700: XMP}),
    "TIFF tag and another xmp, alpha": _saved("TIFF", "RGBA", tiffinfo={274: 6, 700: XMP.replace(b'"6"', b'"3"')}),
}


@pytest.mark.parametrize("name", STATED_6)
def test_an_orientation_is_found_wherever_it_stands(name: str) -> None:
    data = STATED_6[name]
    turned = name.startswith("TIFF tag")  # its decoders rotate it
    size = (HEIGHT_PX, WIDTH_PX, 1) if turned else (WIDTH_PX, HEIGHT_PX, 6)
    header = read_header(data)
    assert (header.width_px, header.height_px, header.exif_orientation) == size
    picture = open_picture(data)
    upright, stated = np.rot90(PHOTO, -1), picture.upright().astype(int)
    assert stated.shape == upright.shape and np.abs(stated - upright).mean() < 2
    alpha = picture.upright_alpha()
    if "alpha" in name:
        assert alpha is not None
        np.testing.assert_array_equal(alpha, np.rot90(ALPHA, -1))
    else:
        assert alpha is None


def test_damaged_metadata_is_no_orientation() -> None:
    for text in (b"", b"\nexif\n  9\nxyz", b"\nexif\n  9\n456", b"exif"):
        assert read_header(_png(_packed(b"Raw profile type exif", text))).exif_orientation == 1
    for chunk in (
        _chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"),
        _chunk(b"iTXt", b"XML:com.adobe.xmp"),
        _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1"),
        _chunk(b"eXIf", b""),
        _chunk(b"iCCP", b"name"),
        _itxt(XMP.replace(b'"6"', b'"9"'), 0),
    ):
        np.testing.assert_array_equal(open_picture(_png(chunk)).upright(), PHOTO)


# -- megabytes of text ----------------------------------------------------------------------------------------------

LARGE = {
    "a workflow of 3 MB": _chunk(b"tEXt", b"workflow\0" + b'{"nodes": []}' * 240_000),
    "packed": _packed(b"prompt", b"y" * 3_000_000),
    "texts that unpack to 66 MB": _packed(b"prompt", bytes(990_000)) * 67,
    "an XMP that unpacks to 20 MB": _itxt(bytes(20_000_000), 1),
    "a profile of 2 MB": _chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2_000_000))),
    "a maker's chunk of 9 MB": _chunk(b"caBX", bytes(9_000_000)),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", LARGE)
def test_a_good_png_is_read_whatever_text_it_carries(name: str, place: str) -> None:
    chunk = LARGE[name]
    data = _png(chunk, mode="RGBA") if place == "before" else _png(after=chunk, mode="RGBA")
    assert read_header(data) == read_header(_saved("PNG", "RGBA"))
    np.testing.assert_array_equal(decode(data), PHOTO)
    np.testing.assert_array_equal(read_alpha(data), ALPHA)


def test_a_damaged_text_still_makes_a_damaged_png() -> None:
    chunk = bytearray(_chunk(b"tEXt", b"author\0somebody"))
    chunk[12] ^= 1
    with pytest.raises(ImageError):
        read_header(_png(bytes(chunk)))


# -- formats -------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 48\n%%EndComments\n0 0 80 48 rectfill\nshowpage\n%%EOF\n"
BINARY_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 32, len(EPS), 0, 0, 0, 0, 0) + b"\0\0" + EPS


@pytest.mark.parametrize("data", [EPS, BINARY_EPS], ids=["plain", "binary"])
def test_postscript_under_the_name_of_a_photo_starts_no_program(data: bytes, tmp_path: Path) -> None:
    """Pillow would run Ghostscript; a program of its name that leaves a trace takes its place."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "photo.jpg").write_bytes(data)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from pbe.data.images import ImageError, decode, open_picture, read_alpha, read_header\n"
        "data = Path(sys.argv[1]).read_bytes()\n"
        "for read in (read_header, decode, read_alpha, open_picture):\n"
        "    try:\n        read(data)\n"
        "    except ImageError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(repo_root())}
    command = [sys.executable, "-c", code, str(tmp_path / "photo.jpg")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert len(run.stdout.splitlines()) == 4 and "PostScript or PDF, not a picture" in run.stdout
    assert not (tmp_path / "ran").exists()


def test_pillow_opens_files_in_one_place_by_a_list_of_formats() -> None:
    """Image.open without `formats` tries all that Pillow knows, and with a path it reads devices."""
    found = {}
    for folder in ("pbe", "pipelines", "infra", "tests"):
        for path in sorted((repo_root() / folder).rglob("*.py")):
            name = path.relative_to(repo_root()).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                    assert "open" not in [imported.name for imported in node.names], name
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-2:] == ["Image", "open"]:
                    found[name] = "formats" in [keyword.arg for keyword in node.keywords]
                if isinstance(node, ast.Attribute) and node.attr.startswith("imread"):
                    assert folder == "tests", name
    assert found.pop("pbe/data/metadata.py")
    assert all(name.startswith("tests/") and listed for name, listed in found.items()), found
