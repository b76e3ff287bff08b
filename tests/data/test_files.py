"""A file or a folder that the user names, on disk or on S3: the same names, bytes and tables from both."""

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from pbe import places
from pbe.data import images
from pbe.data.annotations import box_files, class_names, read_annotations
from pbe.data.download import PhotoError
from pbe.data.files import FileTree, SourceError, file_tree
from pbe.data.index import by_shard
from pbe.data.ingest import PhotoLimits, read_shard
from pbe.data.schema import ANNOTATIONS, PHOTOS
from pbe.data.sources import FolderSource

FILES = {
    "b.jpg": b"bytes of b",
    "a.csv": b"x,y\n",
    "with space/ünï+%.jpg": b"of another",
    "deep/er/c.jpg": b"",
    ".hidden": b"h",
}
Put = Callable[[dict[str, bytes]], str]


@pytest.fixture(params=["local", "s3"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Put:
    """put(files): writes them into a folder of the test's own, and returns the folder's address."""
    if request.param == "local":
        folder = str(tmp_path / "my files")
        return lambda files: _put(pafs.LocalFileSystem(), folder, folder, files)
    address = f"{request.getfixturevalue('s3')}/{tmp_path.name}/my%20files"  # a space, as URLs encode it
    return lambda files: _put_on_s3(address, files)


def _put(filesystem: pafs.FileSystem, root: str, address: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = f"{root}/{name}"
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
    return address


def _put_on_s3(address: str, files: dict[str, bytes]) -> str:
    filesystem, root = pafs.FileSystem.from_uri(address)
    return _put(filesystem, root, address, files)


def test_a_folder_is_read_by_names_relative_to_it(put: Put) -> None:
    tree = FileTree(put(FILES), "ingest.images")
    assert tree.is_folder and tree.is_local == (not tree.where.startswith("s3://"))
    assert tree.names() == tree.siblings() == [".hidden", "a.csv", "b.jpg"]
    walked = tree.walk()
    assert [info.name for info in walked] == sorted(FILES)
    assert {info.name: info.size for info in walked} == {name: len(data) for name, data in FILES.items()}
    assert {name: tree.read(name) for name in FILES} == FILES
    assert tree.path_of("a.csv") == f"{tree.where}/a.csv"
    with tree.open("b.jpg") as stream:
        assert (stream.read(5), stream.read(100), stream.read(100)) == (b"bytes", b" of b", b"")
    with pytest.raises(OSError, match=r"gone\.jpg"):
        tree.read("gone.jpg")


def test_a_file_is_its_own_only_name_and_knows_what_lies_beside_it(put: Put) -> None:
    tree = FileTree(f"{put(FILES)}/a.csv", "ingest.boxes")
    assert not tree.is_folder and tree.only_name == "a.csv"
    assert tree.siblings() == [".hidden", "a.csv", "b.jpg"]
    assert tree.read(tree.only_name) == FILES["a.csv"] and tree.read("b.jpg") == FILES["b.jpg"]
    assert tree.path_of("a.csv") == tree.where


def test_a_version_changes_with_the_file(put: Put) -> None:
    tree = FileTree(put({"a.jpg": b"one", "b.jpg": b"two"}), "ingest.images")
    before = {info.name: info.version for info in tree.walk()}
    put({"a.jpg": b"three"})
    after = {info.name: info.version for info in tree.walk()}
    assert before["a.jpg"] != after["a.jpg"] and before["b.jpg"] == after["b.jpg"]


def test_nothing_there_is_one_message_with_the_setting_and_the_place(put: Put) -> None:
    where = put(FILES)
    tree = FileTree(f"{where}/nothing", "ingest.boxes")
    for ask in (lambda: tree.is_folder, tree.names, tree.siblings, lambda: tree.path_of("a")):
        with pytest.raises(SourceError, match=r"^ingest\.boxes: .*/nothing does not exist$") as caught:
            ask()
        assert f"{where}/nothing" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SourceError, match=r"^ingest\.images: "):
        list(FolderSource(FileTree(f"{where}/nothing", "ingest.images")).photos())


def test_a_tree_travels_to_other_processes_after_it_was_opened(put: Put) -> None:
    tree = FileTree(put(FILES), "ingest.images")
    assert tree.is_folder
    again = pickle.loads(pickle.dumps(tree))
    assert again == tree and again.read("b.jpg") == FILES["b.jpg"]


def test_a_relative_place_is_one_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "repository"
    monkeypatch.setattr(places, "repo_root", lambda: root)

    def where(location: str) -> str:
        return file_tree(location, key="k").where

    assert where("photos") == where("./photos/") == str(root / "photos")
    assert where("../photos") == where(str(tmp_path / "photos")) == str(tmp_path / "photos")
    assert where("s3://bucket/my photos/") == "s3://bucket/my photos"


@pytest.mark.parametrize("address", ["s3:///photos", "s3://bucket/my photos", "s3://no-such-bucket/photos"])
def test_an_s3_address_that_cannot_be_opened_is_one_message(s3: str, address: str) -> None:
    with pytest.raises(SourceError, match=r"^ingest\.images") as caught:
        FileTree(address, "ingest.images").names()
    assert address in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ask", [FileTree.names, FileTree.siblings, FileTree.walk], ids=lambda ask: ask.__name__)
def test_a_folder_that_cannot_be_listed_is_one_message(tmp_path: Path, ask: Callable[[FileTree], object]) -> None:
    """The folder was removed, or this user may not read it."""
    tree = FileTree(str(tmp_path / "closed"), "ingest.images")
    (tmp_path / "closed").mkdir()
    assert tree.is_folder
    (tmp_path / "closed").rmdir()
    with pytest.raises(SourceError, match=r"^ingest\.images") as caught:
        ask(tree)
    assert str(tmp_path / "closed") in str(caught.value) and "\n" not in str(caught.value)


# -- what a folder may hold ------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_links_to_folders_are_named_and_no_circle_is_walked(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "deep" / "er").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (photos / "deep" / "a.jpg").write_bytes(b"a")
    (photos / "link.jpg").symlink_to("deep/a.jpg")  # DVC watches the file behind it
    tree = FileTree(str(photos), "ingest.images")
    assert [info.name for info in tree.walk()] == ["deep/a.jpg", "link.jpg"]
    (photos / "deep" / "up").symlink_to("..")
    (photos / "deep" / "er" / "top").symlink_to(photos)
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError) as caught:
        list(FolderSource(tree).photos())
    told = str(caught.value)
    assert told.startswith("ingest.images: ") and "\n" not in told
    assert all(f"{photos}/{name} (a link to a folder)" in told for name in ("deep/up", "deep/er/top", "more"))


@pytest.mark.timeout(20, method="thread")  # a signal does not end a wait inside Arrow
def test_what_is_neither_file_nor_folder_is_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to("nothing")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    tree = FileTree(str(tmp_path), "ingest.images")
    kinds = {"pipe": "a named pipe", "zero": "a link to a device", "gone": "a broken link", "loop": "a broken link"}
    with pytest.raises(SourceError) as caught:
        tree.walk()
    for name, kind in (kinds | {"socket": "a socket"}).items():
        assert f"{tmp_path}/{name}.jpg ({kind})" in str(caught.value)
    for name in ("pipe.jpg", "zero.jpg", "socket.jpg"):
        with pytest.raises(OSError, match="not a file"):
            tree.open(name)
        with pytest.raises(PhotoError) as refused:
            FolderSource(tree).read(name, 100)
        assert refused.value.reason == "image_unreadable"
    with pytest.raises(SourceError, match=r"^ingest\.boxes: .*pipe\.jpg is a named pipe, not a file or folder$"):
        FileTree(str(tmp_path / "pipe.jpg"), "ingest.boxes").require()


@pytest.mark.timeout(20, method="thread")  # a signal does not end a wait inside Arrow
def test_a_file_too_large_for_a_photo_is_not_hashed(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as stream:
        stream.truncate(1 << 40)
    source = FolderSource(FileTree(str(tmp_path), "ingest.images"))
    (listed,) = source.photos()
    assert listed.column("version")[0].as_py().startswith(f"{1 << 40}:")
    with pytest.raises(PhotoError) as caught:
        source.read("huge.jpg", 100)
    assert caught.value.reason == "image_too_large"


# -- the same input on disk and on S3 ---------------------------------------------------------------------------------


def _input() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (12, 16, 3)).astype(np.uint8) for _ in range(40)]
    files = {f"photos/{n % 3}/p{n:02d}.jpg": images.encode_jpeg(photo, 90) for n, photo in enumerate(photos)}
    files |= {"photos/0/bad.jpg": b"no image", "photos/1/p01 copy.JPG": b"", "photos/2/p00.png": b"x", "photos/x": b""}
    lines = [f"p{n:02d},/m/1,0.1,0.{n % 5 + 4},0.2,0.9" for n in range(42)]
    text = "\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *lines, "bad,/m/1,0,1,0,1", "odd,line", ""])
    return files | {"boxes/train.csv": text.encode(), "boxes/class-descriptions.csv": b"/m/1,Cat\n"}


def _read(where: str) -> tuple[pa.Table, list[pa.Table], list[dict[str, pa.Table]]]:
    """Photos, annotations by shard, and the tables of a shard."""
    source = FolderSource(FileTree(f"{where}/photos", "ingest.images"))
    source = pickle.loads(pickle.dumps(source))  # as workers get it
    (listed,) = source.photos()
    tree = FileTree(f"{where}/boxes", "ingest.boxes")
    assert class_names(tree) == {"/m/1": "Cat"}
    (file,) = box_files(tree)
    out = []
    with (
        by_shard(read_annotations(tree, file), ANNOTATIONS, 3) as boxes,
        by_shard([listed], PHOTOS, 3) as photos,
    ):
        annotations = list(boxes)
        for mine, known in zip(annotations, photos, strict=True):
            tables, _ = read_shard(
                mine,
                known,
                read=lambda image_id, address: source.read(address, 10_000),
                address_without_photo=source.address_without_photo,
                lists_all=source.lists_all,
                limits=PhotoLimits(exif="ignore", max_pixels=1000),
                threads=4,
            )
            out.append(tables)
    return listed, annotations, out


def test_the_tables_from_s3_are_those_from_the_disk(s3: str, tmp_path: Path) -> None:
    files = _input()
    local = _put(pafs.LocalFileSystem(), str(tmp_path), str(tmp_path), files)
    address = f"{s3}/{tmp_path.name}"
    remote = _put_on_s3(address, files)
    one, other = _read(local), _read(remote)
    assert one[0].drop(["version"]).equals(other[0].drop(["version"]))
    assert all(len(set(listed.column("version").to_pylist())) > 1 for listed, _, _ in (one, other))
    assert one[1] == other[1]
    for here, there in zip(one[2], other[2], strict=True):
        for name in ("images", "boxes", "rejects"):
            assert here[name].equals(there[name]), name
    assert sum(tables["images"].num_rows for tables in one[2]) == 40
    assert sum(tables["rejects"].num_rows for tables in one[2]) > 5


def test_a_photo_on_s3_that_is_too_large_or_gone_is_its_own_reject(s3: str, tmp_path: Path) -> None:
    address = f"{s3}/{tmp_path.name}"
    _put_on_s3(address, {"a.jpg": b"x" * 50})
    source = FolderSource(FileTree(address, "ingest.images"))
    assert source.read("a.jpg", 50) == b"x" * 50
    for name, most, reason in (("a.jpg", 49, "image_too_large"), ("gone.jpg", 49, "image_unpublished")):
        with pytest.raises(PhotoError) as caught:
            source.read(name, most)
        assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_an_s3_server_that_goes_away_is_worth_another_try(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself existed, so a missing photo is a failed download and does not end the stage."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    address = f"{s3}/{tmp_path.name}"  # all of moto's servers in one process hold the same buckets
    _put_on_s3(address, {"a.jpg": b"bytes"})
    source = FolderSource(FileTree(address, "ingest.images"))
    assert source.read("a.jpg", 100) == b"bytes"
    server.stop()
    with pytest.raises(PhotoError) as caught:
        source.read("a.jpg", 100)
    assert caught.value.reason == "download_failed" and "\n" not in str(caught.value)
