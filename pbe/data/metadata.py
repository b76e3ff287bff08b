"""What a picture file says besides its pixels: EXIF, XMP and its colour profile (ICC).

Pillow reads headers here, and nowhere else: from bytes, with an explicit list of formats. It would hand others, such as
PostScript under the name photo.jpg, to programs outside (Ghostscript).
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import ExifTags, Image

Buffer = bytes | memoryview
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
UPRIGHT = 1
MAX_BLOCK_BYTES = 16 << 20  # unpacked; the rest of a larger block is not read. Printers' profiles have some 3 MB

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_ICC = b"ICC_PROFILE\0"
# chunks that decoders read, and small ones. Others may be large (ComfyUI and cameras write megabytes of text), and
# Pillow refuses pictures with much text
_PNG_CHUNKS = b"tRNS acTL fcTL fdAT gAMA cHRM sRGB sBIT bKGD pHYs hIST tIME cICP mDCV cLLI oFFs".split()
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_XMP_KEYWORD, _XMP_START = b"XML:com.adobe.xmp", b"http://ns.adobe.com/xap/1.0/\0"
_RAW_PROFILES = {
    b"raw profile type exif": "exif",
    b"raw profile type app1": "exif",
    b"raw profile type xmp": "xmp",
    b"raw profile type icc": "profile",
    b"raw profile type icm": "profile",
}
_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]")


@dataclass(frozen=True)
class Metadata:
    """Blocks as stored, unpacked; empty where the file has none."""

    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""


def open_header(data: Buffer) -> Image.Image:
    """Open a picture without decoding it. Raises what Pillow raises, for other formats than FORMATS too."""
    return Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)


def read_orientation(data: Buffer, image: Image.Image) -> int:
    """Orientation 1..8 by EXIF, else by XMP; 1 = upright, not stated or nonsense. image: `data` by `open_header`.

    1 for a TIFF with the tag: its decoders rotate it themselves.
    """
    if image.format == "TIFF" and ExifTags.Base.Orientation in getattr(image, "tag_v2", ()):
        return UPRIGHT
    found = _read_png(data) if _is_png(data) else _from_info(image)
    stated = _exif_orientation(found.exif)
    if stated in range(1, 9):
        return stated
    written = _ORIENTATION.search(found.xmp)
    return int(written[1]) if written else UPRIGHT


def _exif_orientation(block: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(block)
        stated = exif.get(ExifTags.Base.Orientation, 0)
    except Exception:  # damaged blocks raise all kinds of errors
        return 0
    return stated if isinstance(stated, int) else 0


def read_profile(data: Buffer) -> bytes:
    """The embedded colour profile; empty if there is none."""
    if data[:3] == _JPEG:
        return _jpeg_profile(data)
    if _is_png(data):
        return _read_png(data).profile
    with open_header(data) as image:
        return _from_info(image).profile


def _from_info(image: Image.Image) -> Metadata:
    blocks = (image.info.get(key) for key in ("exif", "xmp", "icc_profile"))
    return Metadata(*(block if isinstance(block, bytes) else b"" for block in blocks))


# -- JPEG ----------------------------------------------------------------------------------------------------------


def _jpeg_profile(data: Buffer) -> bytes:
    """The profile, in up to 255 segments APP2 before the pixels. Pillow finds it too, but takes longer."""
    parts: dict[int, bytes] = {}
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], (data[at + 2] << 8) + data[at + 3]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA or size < 2:  # the pixels follow
            break
        if marker == 0xE2 and bytes(data[at + 4 : at + 16]) == _ICC and size > 16:
            parts.setdefault(data[at + 16], bytes(data[at + 18 : at + 2 + size]))
        at += 2 + size
    return b"".join(parts[number] for number in sorted(parts))


# -- PNG -----------------------------------------------------------------------------------------------------------


def with_png_text(png: bytes, keyword: str, text: str) -> bytes:
    """The PNG with a chunk iTXt, after its pixels, where decoders need not read it. keyword: Latin-1, 1 to 79 bytes."""
    body = b"iTXt" + keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    *_, (_, end_chunk, _) = _png_chunks(png)
    return png[:end_chunk] + chunk + png[end_chunk:]


def read_png_text(data: Buffer, keyword: str, *, max_bytes: int) -> bytes | None:
    """UTF-8 of the first such chunk iTXt, unpacked; of a longer one, its first `max_bytes`. None if there is none."""
    if not _is_png(data):
        return None
    for kind, start, end in _png_chunks(data):
        if kind == b"iTXt" and _is_sound(data, start, end):
            found, _, rest = bytes(data[start + 8 : end - 4]).partition(b"\0")
            if found == keyword.encode("latin-1"):
                return _text(kind, rest, max_bytes)
    return None


def _is_png(data: Buffer) -> bool:
    return bytes(data[:8]) == _PNG


def _png_chunks(data: Buffer) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each whole chunk."""
    at = 8
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data):
            return
        yield kind, at, end
        at = end


def _is_sound(data: Buffer, start: int, end: int) -> bool:
    """The checksum fits. Damaged chunks stay, so that decoders refuse the picture."""
    return zlib.crc32(data[start + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]


def without_metadata(data: Buffer) -> Buffer:
    """The same picture. A PNG loses its text, EXIF and profile, over whose size decoders would stumble."""
    if not _is_png(data):
        return data
    kept, at = [], 0
    for kind, start, end in _png_chunks(data):
        if kind[0] & 0x20 and kind not in _PNG_CHUNKS and _is_sound(data, start, end):
            kept.append(data[at:start])
            at = end
    return b"".join([*kept, data[at:]]) if kept else data


def _read_png(data: Buffer) -> Metadata:
    """The blocks of a PNG, also after the pixels, from all the places that programs write them to.

    EXIF: eXIf, else ImageMagick's "Raw profile type exif" or "APP1". XMP: iTXt, else a raw profile. Colour profile:
    iCCP, else a raw profile. The first of a kind counts.
    """
    found: dict[str, bytes] = {}
    for kind, start, end in _png_chunks(data):
        if kind not in (b"eXIf", b"iCCP", *_PNG_TEXTS) or not _is_sound(data, start, end):
            continue
        body = bytes(data[start + 8 : end - 4])
        keyword, _, rest = body.partition(b"\0")
        if kind == b"eXIf":
            found.setdefault("exif", body)
        elif kind == b"iCCP":
            found.setdefault("profile", _inflated(rest[1:]))
        elif keyword == _XMP_KEYWORD:
            found.setdefault("xmp", _text(kind, rest))
        elif keyword.lower() in _RAW_PROFILES and keyword.decode() not in found:
            found[keyword.decode()] = block = _raw_profile(_text(kind, rest))
            name = "xmp" if block.startswith(_XMP_START) else _RAW_PROFILES[keyword.lower()]
            found.setdefault(f"raw {name}", block)
    return Metadata(*(found.get(name) or found.get(f"raw {name}", b"") for name in ("exif", "xmp", "profile")))


def _text(kind: bytes, rest: bytes, max_bytes: int = MAX_BLOCK_BYTES) -> bytes:
    """The text of a chunk, after its keyword."""
    if kind == b"tEXt":
        return rest[:max_bytes]
    if kind == b"zTXt":
        return _inflated(rest[1:], max_bytes)
    packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]  # after language and translated keyword
    return _inflated(text, max_bytes) if packed else text[:max_bytes]


def _raw_profile(text: bytes) -> bytes:
    """A block as ImageMagick writes it: its name and size, each in a line, then hexadecimal digits."""
    lines = text.lstrip(b"\n").split(b"\n", 2)
    try:
        return bytes.fromhex(lines[2].decode())
    except (ValueError, IndexError):
        return b""


def _inflated(packed: bytes, max_bytes: int = MAX_BLOCK_BYTES) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, max_bytes)
    except zlib.error:
        return b""
