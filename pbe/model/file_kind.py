"""Tells what a file is by its content: a suffix may lie, and a download may have brought something else."""

from pathlib import Path
from typing import Literal

from pbe.errors import one_line

WeightFormat = Literal["safetensors", "torch zip", "torch legacy"]
HEAD_BYTES = 512

_ADVICE_DOWNLOAD = "download it again"
# first bytes, what it is, what to do
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for", "run `git lfs pull` there"),
    (b"# xet version", "a pointer of the hub's Xet storage, not the file that it stands for", _ADVICE_DOWNLOAD),
    (b"/annex/objects/", "a git-annex pointer, not the file that it stands for", "run `git annex get` there"),
    (b"GGUF", "a GGUF file, of llama.cpp", "use the safetensors or the checkpoint that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras", "use weights for PyTorch"),
    (b"\x93NUMPY", "a numpy array", "use the safetensors or the checkpoint"),
    (b"\x08\x01\x12", "a TensorFlow graph", "use weights for PyTorch"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (b"BZh", "compressed by bzip2", "unpack it"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x89PNG", "a PNG picture", _ADVICE_DOWNLOAD),
    (b"\xff\xd8\xff", "a JPEG picture", _ADVICE_DOWNLOAD),
    (b"%PDF", "a PDF", _ADVICE_DOWNLOAD),
)
_ONNX = tuple(bytes([8, version, 0x12]) for version in range(2, 20))  # ir_version, then the producer's name


def weight_format(path: Path) -> WeightFormat:
    """The format of a weight file. Raises ValueError for any other file: what it is, and what to do."""
    if path.is_dir():
        raise ValueError("this is a folder; name a file in it")
    if not path.exists():
        raise ValueError("no such file")
    if not path.is_file():
        raise ValueError("not a regular file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        _refuse_short(head, size)
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "torch legacy"
    raise ValueError(other_kind(head) or f"neither safetensors nor a file of torch.save; it begins with {head[:8]!r}")


def other_kind(head: bytes) -> str | None:
    """What a file with these first bytes (HEAD_BYTES are enough) is, and what to do; None if that is unknown."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"empty; {_ADVICE_DOWNLOAD}"
    if not head.strip(b"\0"):
        return f"only zeros at its beginning: an unfinished download; {_ADVICE_DOWNLOAD}"
    for begin, what, advice in _OTHERS:
        if head.startswith(begin):
            return f"{what}; {advice}"
    if head.startswith(_ONNX):
        return "an ONNX model; use weights for PyTorch"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, or if torch wrote it before 2017, save its state_dict again with torch.save"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return f"a web page, perhaps of an error or a login; {_ADVICE_DOWNLOAD}"
    if _is_text(head):
        return f"a text file that begins with '{one_line(head.decode(errors='replace'), 60)}'"
    return None


def _refuse_short(head: bytes, size: int) -> None:
    header_bytes = int.from_bytes(head[:8], "little")
    if 8 + header_bytes > size:
        raise ValueError(
            f"damaged or incomplete weight file (its header takes {8 + header_bytes} bytes, the file has {size})"
        )


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in head)
