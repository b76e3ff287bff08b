"""One image backend: RGB in, RGB out, every usual format, pixels as stored or upright, one clear error for the rest."""

import io
import os
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pbe.data.images import (
    Header,
    ImageError,
    ImageTooLargeError,
    Resampling,
    centre_square,
    decode,
    encode_jpeg,
    encode_png,
    open_picture,
    read_header,
    resize,
)

HEIGHT_PX, WIDTH_PX = 48, 80


def _noise(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3)).astype(np.uint8)


def _smooth(height_px: int, width_px: int) -> np.ndarray:
    rows, columns = np.mgrid[:height_px, :width_px]
    return np.stack([rows * 3 % 200, columns * 2 % 200, (rows + columns) % 200], axis=2).astype(np.uint8)


def _photo() -> np.ndarray:
    """Different in each corner and channel, with some noise, as photos are."""
    rows, columns = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    base = np.stack([columns * 255 // WIDTH_PX, rows * 255 // HEIGHT_PX, 255 - (rows + columns)], axis=2)
    return np.clip(base + np.random.default_rng(0).integers(-6, 7, base.shape), 0, 255).astype(np.uint8)


def _saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


PHOTO = _photo()
PICTURE = Image.fromarray(PHOTO)
GREY = np.asarray(PICTURE.convert("L"))
# from black to white in steps that 8 bits cannot hold
DEEP = np.linspace(0, 65535, HEIGHT_PX * WIDTH_PX).astype(np.uint16).reshape(HEIGHT_PX, WIDTH_PX)
DEEP_RGB = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)
FRAMES = {"save_all": True, "append_images": [ImageOps.invert(PICTURE)], "duration": 40}
JPEG = _saved(PICTURE, "JPEG", quality=92)
PALETTE = PICTURE.quantize(64)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _with_alpha(picture: Image.Image) -> Image.Image:
    out = picture.copy()
    out.putalpha(Image.fromarray((np.indices((HEIGHT_PX, WIDTH_PX)).sum(0) * 2).astype(np.uint8)))
    return out


def _png(array: np.ndarray) -> bytes:
    """Encode RGB with OpenCV, which supports 16 bits."""
    return cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(side_px: int) -> bytes:
    """A PNG of a few bytes that claims side_px x side_px."""
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# name: bytes, expected pixels, tolerance in levels
GOOD: dict[str, tuple[bytes, np.ndarray, float]] = {
    "jpeg": (JPEG, PHOTO, 16),
    "jpeg progressive": (_saved(PICTURE, "JPEG", quality=92, progressive=True), PHOTO, 16),
    "jpeg grey": (_saved(PICTURE.convert("L"), "JPEG", quality=92), _three(GREY), 8),
    "jpeg cmyk": (_saved(PICTURE.convert("CMYK"), "JPEG", quality=98), PHOTO, 16),
    "jpeg, bytes after its end": (JPEG + b"\0camera maker's note" * 50, decode(JPEG), 0),
    "jpeg, another one after its end": (JPEG + _saved(ImageOps.invert(PICTURE), "JPEG"), decode(JPEG), 0),
    "jpeg, bytes before a marker": (JPEG.replace(b"\xff\xdb", b"\0\0\0\xff\xdb", 1), decode(JPEG), 0),
    "jpeg, bytes after the scan": (JPEG[:-2] + b"\x00\x11\x22" + JPEG[-2:], decode(JPEG), 0),
    "png": (_saved(PICTURE, "PNG"), PHOTO, 0),
    "png grey": (_saved(PICTURE.convert("L"), "PNG"), _three(GREY), 0),
    "png black and white": (_saved(PICTURE.convert("1"), "PNG"), np.asarray(PICTURE.convert("1").convert("RGB")), 0),
    "png palette": (_saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0),
    "png palette with alpha": (_saved(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB")), 0),
    "png alpha": (_saved(_with_alpha(PICTURE), "PNG"), PHOTO, 0),
    "png grey and alpha": (_saved(_with_alpha(PICTURE.convert("L")), "PNG"), _three(GREY), 0),
    "png 16 bit grey": (_png(DEEP), _three(DEEP / 257), 1),
    "png 16 bit rgb": (_png(DEEP_RGB), DEEP_RGB / 257, 1),
    "png animated": (_saved(PICTURE, "PNG", **FRAMES), PHOTO, 0),
    "png without its last chunk": (_saved(PICTURE, "PNG")[:-12], PHOTO, 0),
    "gif": (_saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
    "gif animated": (
        _saved(PALETTE, "GIF", save_all=True, append_images=[ImageOps.invert(PICTURE).quantize(64)], duration=40),
        np.asarray(PALETTE.convert("RGB")),
        0,
    ),
    "webp": (_saved(PICTURE, "WEBP", lossless=True), PHOTO, 0),
    "webp lossy": (_saved(PICTURE, "WEBP", quality=95), PHOTO, 40),
    "webp alpha": (_saved(_with_alpha(PICTURE), "WEBP", lossless=True, exact=True), PHOTO, 0),
    "webp animated": (_saved(PICTURE, "WEBP", lossless=True, **FRAMES), PHOTO, 0),
    "avif": (_saved(PICTURE, "AVIF", quality=100, subsampling="4:4:4"), PHOTO, 8),
    "avif alpha": (_saved(_with_alpha(PICTURE), "AVIF", quality=100, subsampling="4:4:4"), PHOTO, 8),
    "bmp": (_saved(PICTURE, "BMP"), PHOTO, 0),
    "tiff": (_saved(PICTURE, "TIFF"), PHOTO, 0),
    "tiff alpha": (_saved(_with_alpha(PICTURE), "TIFF"), PHOTO, 0),
    "tiff packed": (_saved(PICTURE, "TIFF", compression="tiff_lzw"), PHOTO, 0),
    "tiff 16 bit": (_saved(Image.fromarray(DEEP), "TIFF"), _three(DEEP / 257), 1),
}
WHOLE = {name: data for name, (data, _, _) in GOOD.items() if "," not in name and "without" not in name}


def test_memory_of_arrow_is_decoded_as_bytes_are() -> None:
    """Its bytes are signed, so that a JPEG looked like another format, whose decoder takes longer and other damage."""

    def of_arrow(data: bytes) -> memoryview:
        return memoryview(pa.array([data])[0].as_buffer())

    for data, _, _ in GOOD.values():
        np.testing.assert_array_equal(decode(of_arrow(data)), decode(data))
    with pytest.raises(ImageError, match="the end of the JPEG is missing"):
        decode(of_arrow(JPEG[: len(JPEG) // 2]))


@pytest.mark.parametrize("name", GOOD)
def test_every_usual_format_is_its_picture_in_rgb(name: str) -> None:
    data, expected, most = GOOD[name]
    assert read_header(data) == Header(WIDTH_PX, HEIGHT_PX, 1)
    image = decode(data)
    assert image.shape == (HEIGHT_PX, WIDTH_PX, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(float) - expected).max() <= most


@pytest.mark.parametrize("name", WHOLE)
def test_half_a_picture_is_no_picture(name: str) -> None:
    data = WHOLE[name]
    # what is cut off is more than a PNG's last chunk, which holds nothing, and not only an animation's second frame
    size = len(WHOLE[name.removesuffix(" animated")])
    for share in (0.02, 0.5, 0.98):
        with pytest.raises(ImageError) as caught:
            decode(data[: min(int(share * size), size - 30)])
        assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"not an image" * 20, None),
        (b"\xff\xd8\xff", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"GIF89a", None),
        (b"RIFF\x10\0\0\0WEBPVP8 ", None),
        (b"\n <!DOCTYPE html><html><body>Not found</body></html>", "a web page or an error message"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "a web page or an error message"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', None),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*export it as JPEG"),
    ],
    ids=lambda value: repr(value[:12]) if value else "",
)
def test_bytes_that_are_no_image_give_one_error(data: bytes, message: str | None) -> None:
    for read in (read_header, decode):
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive"])
def test_half_a_jpeg_is_refused_also_when_it_was_given_an_end_marker(name: str) -> None:
    """libjpeg says "premature end of data segment", and "extraneous bytes" of what is harmless."""
    data = GOOD[name][0]
    with pytest.raises(ImageError):
        decode(data[: len(data) // 2] + b"\xff\xd9")


def test_a_damaged_png_is_refused() -> None:
    data = _saved(PICTURE, "PNG")
    middle = len(data) // 2
    with pytest.raises(ImageError):
        decode(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])


def test_an_error_is_the_same_at_every_run() -> None:
    """The message is stored in the rejects table and so is part of its digest."""

    def message(data: bytes) -> str:
        with pytest.raises(ImageError) as caught:
            decode(data, exif_orientation=read_header(data).exif_orientation)
        return str(caught.value)

    for data in (b"x", JPEG[:400], JPEG[:-20], b"GIF89a", bytes(5000), GOOD["gif"][0][:-50]):
        assert message(data) == message(data) and " at 0x" not in message(data)


# -- size and orientation -------------------------------------------------------------------------------------------


def test_a_bomb_is_measured_or_refused_without_being_unpacked() -> None:
    """In a separate process, so that its peak memory is its own."""
    code = (
        "import resource, sys\n"
        "from pbe.data.images import ImageError, ImageTooLargeError, decode, read_header\n"
        "data, before = sys.stdin.buffer.read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for read in (read_header, decode):\n"
        "    try:\n"
        "        read(data)\n"
        "    except ImageError as error:\n"
        "        assert '50000' in str(error) or '2500000000' in str(error), error\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    data = _bomb(50_000)
    assert len(data) < 200
    run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(run.stdout) < 200_000  # KB; unpacked it is 7.5 GB


def test_the_header_of_a_png_is_read_without_its_pixels() -> None:
    """So that too large images are rejected early: the first claims 243 MB, the second is beyond Pillow's limit."""
    assert read_header(_bomb(9_000)) == Header(9_000, 9_000, 1)
    with pytest.raises(ImageTooLargeError):
        read_header(_bomb(12_000))


@pytest.mark.parametrize(("kind", "more"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_all_orientations_are_turned_as_every_viewer_does(kind: str, more: dict[str, Any]) -> None:
    for orientation in range(1, 9) if kind == "JPEG" else (1, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = _saved(PICTURE, kind, exif=exif, **more)
        assert read_header(data) == Header(WIDTH_PX, HEIGHT_PX, orientation)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=[kind])))
        got = decode(data, exif_orientation=orientation)
        assert got.shape == upright.shape == ((HEIGHT_PX, WIDTH_PX, 3) if orientation < 5 else (WIDTH_PX, HEIGHT_PX, 3))
        assert np.abs(got.astype(int) - upright).max() <= (2 if kind == "JPEG" else 0)
        # OpenImages' boxes match the stored file: the default is not to rotate
        np.testing.assert_array_equal(decode(data), decode(_saved(PICTURE, kind, **more)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_whose_scale_nobody_knows_are_refused_not_clipped(dtype: type[np.generic]) -> None:
    data = _saved(Image.fromarray((DEEP / 7).astype(dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"32 bits or floating point.*save it with 8 or 16 bits"):
        decode(data)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_with_an_orientation_is_turned_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = _saved(PICTURE, "TIFF", exif=exif)
    header = read_header(data)
    upright = np.rot90(PHOTO, {3: 2, 6: -1}[orientation])
    np.testing.assert_array_equal(decode(data, exif_orientation=header.exif_orientation), upright)


def _tagged(body: bytes) -> bytes:
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def _exif(kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHI", ExifTags.Base.Orientation, kind, count) + value
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, 1) + entry + struct.pack(f"{order}I", 0)


@pytest.mark.parametrize(
    ("body", "orientation"),
    [
        (_exif(3, 1, struct.pack("<HH", 6, 0)), 6),
        (_exif(3, 1, struct.pack(">HH", 6, 0), ">"), 6),
        (_exif(3, 1, struct.pack("<HH", 9, 0)), 1),
        (_exif(2, 2, b"6\0\0\0"), 1),
        (b"Exif\0\0no TIFF at all", 1),
        (b"Exif\0\0II*\0\xff\xff\xff\x7f", 1),  # points behind its end
        (_exif(3, 1 << 31, b"\0\0\0\0"), 1),
        (_exif(99, 1, b"\0\0\0\0"), 1),
    ],
    ids=range(8),
)
def test_an_orientation_that_makes_no_sense_is_upright_and_costs_no_photo(body: bytes, orientation: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged tags
        assert read_header(_tagged(body)) == Header(WIDTH_PX, HEIGHT_PX, orientation)
    np.testing.assert_array_equal(decode(_tagged(body)), decode(JPEG))


# -- files ----------------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "told"), [(_pipe, "a named pipe"), (_socket, "a socket"), (_device, "a device"), (Path.mkdir, "a folder")]
)
def test_what_is_no_file_is_told_and_not_waited_for(make: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    make(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=f"^{told}, not a file$"):
        open_picture(tmp_path / "a.jpg")


def test_a_file_and_its_bytes_are_held_to_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    for source in (path, JPEG):
        np.testing.assert_array_equal(open_picture(source).upright(), decode(JPEG))
        assert open_picture(source, max_bytes=len(JPEG), max_pixels=HEIGHT_PX * WIDTH_PX).data == JPEG
        with pytest.raises(ImageTooLargeError, match=f"^more than {len(JPEG) - 1} bytes$"):
            open_picture(source, max_bytes=len(JPEG) - 1)
        with pytest.raises(ImageTooLargeError, match=r"^80 x 48 px, more than 3839 pixels$"):
            open_picture(source, max_pixels=HEIGHT_PX * WIDTH_PX - 1)
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)  # of which the disk holds nothing
    with pytest.raises(ImageTooLargeError):
        open_picture(path)


# -- JPEG and PNG of our own ----------------------------------------------------------------------------------------


def test_jpeg_is_close_and_red_stays_red() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250
    for data in (encode_jpeg(image, 95), encode_png(image)):
        red, green, blue = decode(data).reshape(-1, 3).mean(0)
        assert red > 240 and green < 10 and blue < 10
    smooth = _smooth(60, 60)
    errors = [np.abs(decode(encode_jpeg(smooth, quality)).astype(int) - smooth).mean() for quality in (30, 95, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1


@pytest.mark.parametrize(("chroma", "samples"), [(None, [0x11] * 3), ("444", [0x11] * 3), ("420", [0x22, 0x11, 0x11])])
def test_jpeg_has_the_colour_resolution_that_is_asked_for(chroma: Any, samples: list[int]) -> None:
    """In the frame header: samples of each of the three components, four bits across and four down."""
    data = encode_jpeg(_noise(16, 16), 95, *([chroma] if chroma else []))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 9] == 3
    assert [data[frame + 11 + 3 * index] for index in range(3)] == samples


def test_a_view_is_encoded_like_its_copy() -> None:
    view = _noise(40, 60)[5:30:2, ::-1]
    assert encode_jpeg(view, 90) == encode_jpeg(view.copy(), 90) and encode_png(view) == encode_png(view.copy())


# -- resizing -------------------------------------------------------------------------------------------------------


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


def test_shrinking_below_a_quarter_averages_areas() -> None:
    image = _noise(40, 54)
    blocks = image.reshape(8, 5, 9, 6, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(resize(image, width_px=9, height_px=8), blocks, atol=0.51)


def test_shrinking_to_a_quarter_or_more_interpolates_between_pixel_centres() -> None:
    """As upstream: a pixel at x of the result is read at (x + 0.5) * scale - 0.5, from its two neighbours."""
    image = _noise(1, 30)
    for width_px in (8, 15, 20, 29):
        at = (np.arange(width_px) + 0.5) * 30 / width_px - 0.5
        left = np.floor(at).astype(int)
        weight = (at - left)[:, None]
        expected = image[0, left] * (1 - weight) + image[0, np.minimum(left + 1, 29)] * weight
        np.testing.assert_allclose(resize(image, width_px=width_px, height_px=1)[0], expected, atol=1)
    tall = resize(_noise(100, 30), width_px=20, height_px=10)  # one side far below a quarter: still bilinear
    np.testing.assert_array_equal(tall, cv2.resize(_noise(100, 30), (20, 10), interpolation=cv2.INTER_LINEAR))


def test_growing_interpolates_between_pixel_centres() -> None:
    image = np.array([[[0] * 3, [200] * 3]], np.uint8)
    assert resize(image, width_px=4, height_px=1)[0, :, 0].tolist() == [0, 50, 150, 200]


@pytest.mark.parametrize("size", [(427, 640), (640, 425), (480, 640), (333, 500), (512, 700), (640, 640), (61, 150)])
@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize("odd", ["even", "down"])
def test_a_centre_square_is_cut_from_the_whole_resized_picture(
    size: tuple[int, int], resampling: Resampling, odd: Literal["even", "down"]
) -> None:
    """torchvision's Resize(512), whose longer side is int(512 * long / short), then CenterCrop(512); written again."""
    photo = _noise(*size)
    high, wide = (int(512 * px / min(size)) for px in size)
    whole = np.array(Image.fromarray(photo).resize((wide, high), Image.Resampling[resampling.upper()]))
    top, left = ((px - 512) // 2 if odd == "down" else round((px - 512) / 2.0) for px in (high, wide))
    expected = whole[top : top + 512, left : left + 512]
    np.testing.assert_array_equal(centre_square(photo, 512, resampling=resampling, odd=odd), expected)


def test_a_centre_square_of_a_strip_needs_no_long_picture() -> None:
    strip = _noise(30, 600)
    whole = np.array(Image.fromarray(strip).resize((1280, 64), Image.Resampling.BILINEAR))[:, 608:672]
    found = centre_square(strip, 64, resampling="bilinear")
    assert np.abs(found.astype(int) - whole).max() <= 1
    assert centre_square(_noise(1, 60_000), 512, resampling="bilinear").shape == (512, 512, 3)


def test_the_same_size_is_the_same_image() -> None:
    image = _noise(13, 21)
    np.testing.assert_array_equal(resize(image, width_px=21, height_px=13), image)
