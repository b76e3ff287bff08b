"""Parts and manifests: all or nothing on disk, names and bytes depend only on content, damage is noticed."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wsgi import get_input_stream

from pbe import store as store_module
from pbe.errors import UserError
from pbe.places import repo_root
from pbe.store import (
    File,
    ManifestError,
    PartError,
    Record,
    Store,
    StoreError,
    digest,
    load_manifest,
    make_manifest,
    save_manifest,
    write_json,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, store: Store) -> Iterator[Store]:
    """A store on the disk, then one on S3."""
    if request.param == "local":
        yield store
        return
    remote = Store(request.getfixturevalue("s3") + "/prefix")
    assert not remote.is_local and remote.full_uri("x/y") == "s3://bucket/prefix/x/y"
    yield remote
    remote.delete_tree("parts")
    remote.delete_tree("runs")


def _table(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "id": [f"row{index % 7}" for index in range(rows)],
            "data": pa.array([rng.bytes(200) for _ in range(rows)], pa.binary()),
            "value": pa.array(rng.standard_normal(rows), pa.float64()),
        }
    )


def _unit(store: Store, name: str = "b0000-abc", rows: int = 300, per_group: int = 64) -> Record:
    tables = {"rows": _table(rows), "rejects": _table(3, seed=1)}
    return store.write_unit("stage", name, tables, counts={"in": rows, "kept": 2}, rows_per_group=per_group)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# -- digests ------------------------------------------------------------------------------------------------------


@given(one=JSON, other=JSON)
def test_equal_values_have_equal_digests_and_others_have_not(one: object, other: object) -> None:
    assert digest(one) == digest(json.loads(json.dumps(one)))
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_a_digest_is_stable_and_takes_no_nan() -> None:
    assert digest({"b": [1, "\u00e4"], "a": None}) == digest({"a": None, "b": [1, "\u00e4"]}) == "3d6f860d37ce3698"
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"lr": float("nan")})


# -- bytes --------------------------------------------------------------------------------------------------------


def test_bytes_come_back_and_folders_are_made(any_store: Store) -> None:
    assert not any_store.exists("runs/b/c.bin")
    for data in (b"one", b"", bytes(range(256)) * 5000):
        any_store.write_bytes("runs/b/c.bin", data)
        assert any_store.read_bytes("runs/b/c.bin") == data
    assert any_store.exists("runs/b/c.bin") and not any_store.exists("runs/b")
    assert any_store.list_names("runs/b") == ["c.bin"]  # nothing left beside


def test_a_write_that_is_cut_off_leaves_the_old_file_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_bytes("x", b"old")

    def power_cut(source: str, target: str) -> None:
        assert Path(source).read_bytes() == b"new" and Path(source).parent == Path(target).parent
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(StoreError, match=r"x: cannot be written: power cut"):
        store.write_bytes("x", b"new")
    assert store.read_bytes("x") == b"old"


def test_a_file_is_written_while_the_next_is_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of a part's slots would otherwise take turns with the processor."""
    encode, write, second_begun, overlapped = store_module._parquet_bytes, Store.write_bytes, threading.Event(), []

    def encoded(table: pa.Table, rows_per_group: int) -> memoryview:
        if table.num_rows == 2:
            second_begun.set()
        return encode(table, rows_per_group)

    def written(store: Store, relative: str, data: bytes | memoryview) -> None:
        if relative.endswith("/first.parquet"):
            overlapped.append(second_begun.wait(20))
        write(store, relative, data)

    monkeypatch.setattr(store_module, "_parquet_bytes", encoded)
    monkeypatch.setattr(Store, "write_bytes", written)
    record = store.write_unit("a", "u", {"first": pa.table({"x": [1]}), "second": pa.table({"x": [1, 2]})}, counts={})
    assert overlapped == [True] and store.find_unit("a", "u") == record


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_a_file_that_cannot_be_written_leaves_no_record(store: Store, name: str) -> None:
    (Path(store.path("parts/a/u")) / f"{name}.parquet").mkdir(parents=True)
    table = pa.table({"x": [1]})
    with pytest.raises(StoreError, match=f"parts/a/u/{name}.parquet: cannot be written"):
        store.write_unit("a", "u", dict.fromkeys(("first", "second", "third"), table), counts={})
    assert not store.exists("parts/a/u/record.json")


def test_a_file_that_cannot_be_copied_in_says_why(store: Store, tmp_path: Path) -> None:
    """The failed write still holds the mapped file; closing it raised BufferError instead."""
    (tmp_path / "weights").write_bytes(b"x")
    Path(store.path("runs/weights")).mkdir(parents=True)
    with pytest.raises(StoreError, match=r"runs/weights: cannot be written: Is a directory; finished parts"):
        store.copy_file_in(tmp_path / "weights", "runs/weights")


def test_bytes_are_on_the_disk_before_they_get_their_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(handle: int) -> None:
        order.append("fsync")
        fsync(handle)

    def noted_replace(source: str, target: str) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.write_bytes("x", b"data")
    assert order == ["fsync", "rename"]


def test_a_missing_file_is_a_user_error_with_its_address(any_store: Store) -> None:
    with pytest.raises(StoreError, match="not found in the storage") as caught:
        any_store.read_bytes("a/b")
    assert isinstance(caught.value, UserError) and f"{any_store.uri}/a/b" in str(caught.value)


def test_names_are_listed_sorted_with_folders_and_nothing_for_no_folder(any_store: Store) -> None:
    for name in ("runs/b/x", "runs/a", "runs/c/deep/y"):
        any_store.write_bytes(name, b"")
    assert any_store.list_names("runs") == ["a", "b", "c"]
    assert any_store.list_names("nothing") == []


def test_trees_are_copied_in_and_out_and_deleted(any_store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name, data in {"a.json": b"1", "sub/deep/b.bin": bytes(range(256)), "sub/empty": b""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    any_store.copy_tree_in(source, "runs/r/export")
    any_store.copy_tree_out("runs/r/export", target)
    assert _files(target) == _files(source)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in _files(source))
    any_store.write_bytes("runs/other", b"stays")
    any_store.delete_tree("runs/r")
    any_store.delete_tree("runs/never")
    assert any_store.list_names("runs") == ["other"]
    with pytest.raises(PartError, match=r"/runs/r/export: this part is gone$") as caught:
        any_store.copy_tree_out("runs/r/export", target)
    assert caught.value.kind == "runs"


def test_a_store_travels_to_other_processes(any_store: Store) -> None:
    any_store.write_bytes("runs/x", b"here")
    again = pickle.loads(pickle.dumps(any_store))
    assert again.uri == any_store.uri and again.is_local == any_store.is_local and again.read_bytes("runs/x") == b"here"


# -- units --------------------------------------------------------------------------------------------------------


def test_a_finished_unit_is_found_with_the_record_that_was_written(any_store: Store) -> None:
    record = _unit(any_store)
    assert any_store.find_unit("stage", "b0000-abc") == record
    assert any_store.find_unit("stage", "b0000-other") is None and any_store.find_unit("other", "b0000-abc") is None
    rows = record.file("rows")
    assert (rows.rows, rows.path) == (300, "parts/stage/b0000-abc/rows.parquet")
    data = any_store.read_bytes(rows.path)
    assert (rows.bytes, rows.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert any_store.read_table(rows).equals(_table(300))
    assert any_store.read_table(rows, columns=["value"]).column_names == ["value"]
    with any_store.open_parquet(rows) as parquet:
        assert [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)] == [64] * 4 + [44]
    with pytest.raises(StoreError, match="unit b0000-abc has no dataset 'boxes'"):
        record.file("boxes")


@pytest.mark.parametrize("stop", range(3))
def test_a_unit_that_was_cut_off_is_not_there(stop: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is written last: after 0, 1 or 2 of the three files there is no unit; the next try completes it."""
    write = Store.write_bytes
    written: list[str] = []

    def killed(self: Store, relative: str, data: bytes) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(relative)
        write(self, relative, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            _unit(store)
    assert store.find_unit("stage", "b0000-abc") is None
    record = _unit(store)
    assert store.find_unit("stage", "b0000-abc") == record


@pytest.mark.parametrize("damage", ["gone", "longer", "shorter", "folder"])
def test_a_unit_whose_file_has_another_size_is_not_there(damage: str, store: Store) -> None:
    path = Path(store.path(_unit(store).file("rejects").path))
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(data + b"x" if damage == "longer" else data[:-1])
    assert store.find_unit("stage", "b0000-abc") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"unit": "x"}', '{"unit": "x", "files": [{}], "counts": {}}'])
def test_a_unit_whose_record_cannot_be_read_is_not_there(text: str, any_store: Store) -> None:
    _unit(any_store)
    any_store.write_bytes("parts/stage/b0000-abc/record.json", text.encode())
    assert any_store.find_unit("stage", "b0000-abc") is None


def test_equal_tables_give_equal_bytes_however_they_came_about(store: Store) -> None:
    """Chunks, slices of a larger table, and order of writing do not matter: same rows, same file."""
    table = pa.table(
        {"data": [bytes([index % 251]) * 3000 for index in range(700)], "id": [str(i) for i in range(700)]}
    )
    for per_group in (64, 1000):
        chunked = pa.concat_tables([table.slice(start, 37) for start in range(0, 700, 37)])
        sliced = pa.concat_tables([table.slice(600), table, table]).combine_chunks().slice(100, 700)
        digests = {
            store.write_unit("s", f"{per_group}-{n}", {"d": t}, counts={}, rows_per_group=per_group).file("d").sha256
            for n, t in enumerate((table, chunked, sliced, table))
        }
        assert len(digests) == 1
    assert _unit(store).files == _unit(store).files


def test_a_unit_named_by_its_content_is_written_once(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"annotations": _table(20), "photos": _table(3, seed=1)}
    record = any_store.write_unit_by_content("index", "b0000", tables)
    assert any_store.find_unit("index", record.unit) == record and record.unit.startswith("b0000-")
    assert any_store.read_table(record.file("annotations")).equals(tables["annotations"])
    others = (
        ("b0001", tables),
        ("b0000", {**tables, "photos": _table(3, seed=2)}),
        ("b0000", {"photos": tables["annotations"], "annotations": tables["photos"]}),
    )
    names = {any_store.write_unit_by_content("index", label, other).unit for label, other in others}
    assert len(names | {record.unit}) == 4
    monkeypatch.setattr(Store, "write_bytes", lambda *_: pytest.fail("it is there already"))
    assert any_store.write_unit_by_content("index", "b0000", tables) == record


def test_a_unit_named_by_its_content_keeps_its_name_under_another_pyarrow(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest ignores pyarrow's version in the footers, and how rows are sliced and chunked."""
    rows: dict[str, list[Any]] = {
        "id": [f"row{k}" for k in range(40)],
        "flag": [k % 3 == 0 for k in range(40)],
        "x": [*range(39), None],
    }
    table = pa.table(rows)
    record = store.write_unit_by_content("index", "b0000", {"d": table})
    longer = pa.table({name: [values[5], *values, values[7]] for name, values in rows.items()})
    chunked = pa.concat_tables([table.slice(0, 13), table.slice(13)])
    write = store_module._parquet_bytes
    monkeypatch.setattr(
        store_module,
        "_parquet_bytes",
        lambda *args, **more: memoryview(
            bytes(write(*args, **more)).replace(b"parquet-cpp-arrow", b"parquet-cpp-other")
        ),
    )
    for same in (table, chunked, longer.slice(1, 40)):
        assert store.write_unit_by_content("index", "b0000", {"d": same}) == record
    assert store.write_unit_by_content("index", "b0000", {"d": longer.slice(0, 40)}).unit != record.unit


def test_a_unit_named_by_its_content_that_is_damaged_is_written_again(store: Store) -> None:
    tables = {"annotations": _table(20), "photos": _table(3, seed=1)}
    record = store.write_unit_by_content("index", "b0000", tables)
    Path(store.path(record.file("photos").path)).unlink()
    assert store.write_unit_by_content("index", "b0000", tables) == record == store.find_unit("index", record.unit)


def test_a_folders_size_is_that_of_all_files_below_it_and_its_age_that_of_the_newest(any_store: Store) -> None:
    before = time.time()
    for name, size in (("runs/r/a", 10), ("runs/r/deep/b", 5), ("runs/other", 100)):
        any_store.write_bytes(name, b"x" * size)
    found = any_store.folder_size("runs/r")
    assert (found.files, found.bytes) == (2, 15)
    assert -1 <= found.age_s <= time.time() - before + 1  # S3 counts whole seconds
    nothing = any_store.folder_size("runs/never")
    assert (nothing.files, nothing.bytes) == (0, 0)


def test_the_age_of_a_folder_is_that_of_its_newest_file(store: Store) -> None:
    for name, age_s in (("runs/r/a", 5000), ("runs/r/deep/b", 900), ("runs/r/c", 7000)):
        store.write_bytes(name, b"x")
        os.utime(store.path(name), (time.time() - age_s,) * 2)
    assert store.folder_size("runs/r").age_s == pytest.approx(900, abs=5)


def test_a_deleted_unit_is_gone_and_its_neighbours_stay(any_store: Store) -> None:
    _unit(any_store)
    stays = _unit(any_store, "b0001-abc")
    any_store.delete_unit("parts/stage/b0000-abc")
    any_store.delete_unit("parts/stage/never")
    assert any_store.list_names("parts/stage") == ["b0001-abc"]
    assert any_store.find_unit("stage", "b0001-abc") == stays


def test_a_unit_that_is_half_deleted_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _unit(store)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "delete_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.delete_unit("parts/stage/b0000-abc")
    assert store.find_unit("stage", "b0000-abc") is None
    assert store.list_names("parts/stage/b0000-abc") == ["rejects.parquet", "rows.parquet"]


def test_no_rows_are_a_table_too(any_store: Store) -> None:
    empty = _table(2).slice(0, 0)
    record = any_store.write_unit("s", "u", {"d": empty}, counts={})
    assert any_store.read_table(record.file("d")).equals(empty) and any_store.find_unit("s", "u") == record


def test_a_missing_part_is_named_with_its_kind(any_store: Store) -> None:
    file = File("d", "parts/s/u/d.parquet", 1, 1, "")
    for read in (any_store.read_table, any_store.open_parquet):
        with pytest.raises(PartError, match=r"/d\.parquet: this part is gone$") as caught:
            read(file)
        assert (caught.value.kind, caught.value.damage) == ("s", None)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it may be sent to another process


def _reads(store: Store, file: File) -> dict[str, Callable[[], pa.Table]]:
    """Every way to read a part's rows."""
    return {
        "whole": lambda: store.read_table(file),
        "columns": lambda: store.read_table(file, columns=["value", "id"]),
        "row groups": lambda: pa.concat_tables(
            [store.read_row_group(file, group, store.read_footer(file)) for group in range(5)]
        ),
    }


@pytest.mark.parametrize("how", ["whole", "columns", "row groups"])
@pytest.mark.parametrize("where", ["anywhere", "footer", "cut", "swapped"])
def test_no_damage_passes_and_every_damage_has_one_advice(how: str, where: str, store: Store) -> None:
    """A flipped bit in a footer gave other values in 1 of 150 reads, and bare pyarrow errors in most others."""
    file = _unit(store).file("rows")
    path, rng = Path(store.path(file.path)), np.random.default_rng(0)
    data, expected = path.read_bytes(), _reads(store, file)[how]()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    messages: list[str] = []
    for _ in range(150):
        damaged = bytearray(data)
        if where in ("anywhere", "footer"):
            at = rng.integers(len(data) - footer if where == "footer" else 0, len(data))
            damaged[at] ^= 1 << int(rng.integers(8))
        elif where == "cut":
            damaged = damaged[: rng.integers(len(data))]
        else:
            first, second = rng.integers(len(data) - 100, size=2)
            damaged[first : first + 100], damaged[second : second + 100] = (
                damaged[second : second + 100],
                damaged[first : first + 100],
            )
        path.write_bytes(damaged)
        try:
            assert _reads(store, file)[how]().equals(expected)
        except PartError as error:
            messages.append(str(error))
    advice = re.compile(re.escape(f"{path}: this part cannot be read (") + r".+\); if it is damaged, delete its folder")
    assert all(advice.fullmatch(message) for message in messages)
    # harmless: unused bits of page headers, and other columns' pages
    expected_rate = {"whole": 150, "row groups": 140, "columns": 0}[how] if where in ("anywhere", "swapped") else 150
    assert len(messages) >= expected_rate


def test_a_part_from_before_footers_were_hashed_is_read(store: Store) -> None:
    record = json.loads(store.read_bytes(f"parts/stage/{_unit(store).unit}/record.json"))
    for entry in record["files"]:
        del entry["footer_sha256"]
    store.write_bytes("parts/stage/b0000-abc/record.json", json.dumps(record).encode())
    found = store.find_unit("stage", "b0000-abc")
    assert found is not None
    for read in _reads(store, found.file("rows")).values():
        assert read().num_rows == 300


# -- names --------------------------------------------------------------------------------------------------------

OUTSIDE = ["../evil", "a/../../evil", "/etc/evil", "a/..", "..", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_storage_is_refused(name: str, any_store: Store, tmp_path: Path) -> None:
    for use in (
        any_store.read_bytes,
        any_store.exists,
        any_store.list_names,
        any_store.delete_file,
        any_store.delete_tree,
        lambda name: any_store.write_bytes(name, b"x"),
        lambda name: any_store.copy_tree_out(name, tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match="leads out of this folder"):
            use(name)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["parts/../../evil", "/etc/passwd", "parts/s/u", "x", "parts/s/u/../../../x"])
def test_a_record_or_manifest_that_names_a_file_outside_is_damaged(name: str, store: Store, tmp_path: Path) -> None:
    record = _unit(store)
    manifest = make_manifest("stage", config={}, version=1, units=[record])
    save_manifest(tmp_path / "manifest.json", manifest)
    for path in (tmp_path / "manifest.json", Path(store.path("parts/stage/b0000-abc/record.json"))):
        path.write_text(path.read_text().replace(record.file("rows").path, name))
    with pytest.raises(ManifestError, match=r"manifest\.json: not a manifest"):
        load_manifest(tmp_path / "manifest.json")
    assert store.find_unit("stage", "b0000-abc") is None


def test_a_key_of_s3_that_leads_out_is_not_written_outside(s3: str, tmp_path: Path) -> None:
    """S3 takes any text as a key; a folder with such a key gives nothing at all."""
    remote, bucket = Store(s3 + "/prefix"), boto3.client("s3")
    remote.write_bytes("runs/r/good", b"good")
    bucket.put_object(Bucket="bucket", Key="prefix/runs/r/x/../../../../evil", Body=b"evil")
    try:
        for use in (lambda: remote.copy_tree_out("runs/r", tmp_path / "a" / "b"), lambda: remote.list_files("runs/r")):
            with pytest.raises(StoreError, match=r"/runs/r: the name 'x/\.\./.*evil' leads out of this folder"):
                use()
        assert not list(tmp_path.rglob("*"))
    finally:
        bucket.delete_object(Bucket="bucket", Key="prefix/runs/r/x/../../../../evil")
        remote.delete_tree("runs")


def test_an_upload_that_fails_leaves_nothing_in_the_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses the third part of a large file: the first two would stay, unseen but on the bill."""
    moto = DomainDispatcherApplication(create_backend_app)

    def refusing(environ: Any, start_response: Any) -> Any:
        if "partNumber=3&" not in environ["QUERY_STRING"] + "&":
            return moto(environ, start_response)
        get_input_stream(environ).read()
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>quota</Message></Error>"]

    server = make_server("127.0.0.1", 0, refusing, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreError, match=r"runs/large: cannot be written: .*AccessDenied.*; finished parts"):
            Store(s3 + "/prefix").write_bytes("runs/large", b"x" * (40 << 20))
        assert not boto3.client("s3").list_multipart_uploads(Bucket="bucket").get("Uploads")
        assert not Store(s3 + "/prefix").exists("runs/large")
    finally:
        server.shutdown()
        thread.join()


# -- manifests ----------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    units = [_unit(store, name, rows) for name, rows in (("b0000-a", 5), ("b0001-b", 0), ("b0002-c", 9))]
    manifest = make_manifest("stage", config={"a": [1, 2], "b": None}, version=3, units=units)
    assert manifest.counts == {"in": 14, "kept": 6}
    assert [file.rows for file in manifest.files("rows")] == [5, 0, 9]
    path = tmp_path / "data" / "stage" / "manifest.json"
    save_manifest(path, manifest)
    assert load_manifest(path) == manifest
    first = path.read_bytes()
    save_manifest(path, load_manifest(path))
    assert path.read_bytes() == first and _files(path.parent) == ["manifest.json"]


def test_a_manifests_digest_names_its_content_and_nothing_else(store: Store) -> None:
    one, two = _unit(store, "b0000-a", 5), _unit(store, "b0001-b", 6)
    base = make_manifest("stage", config={}, version=1, units=[one, two]).digest
    renamed = _unit(store, "b0000-z", 5)
    assert make_manifest("stage", config={"workers": 9}, version=2, units=[renamed, two]).digest == base
    others = {
        make_manifest("stage", config={}, version=1, units=[two, one]).digest,
        make_manifest("stage", config={}, version=1, units=[one]).digest,
        make_manifest("other", config={}, version=1, units=[one, two]).digest,
        make_manifest("stage", config={}, version=1, units=[one, _unit(store, "b0001-b", 7)]).digest,
    }
    assert len(others | {base}) == 5


def test_a_missing_or_damaged_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(ManifestError, match=r"manifest\.json: not there$"):
        load_manifest(path)
    path.write_text("{")
    with pytest.raises(ManifestError, match=r"manifest\.json: not a manifest \(JSONDecodeError .*\)$") as caught:
        load_manifest(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_json_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "counts.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    monkeypatch.setattr(store_module, "_json_bytes", lambda value: b"half")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {})
    assert json.loads(path.read_text()) == {"a": [2], "b": 1} and len(list(path.parent.iterdir())) == 1


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real failure: the kernel lets this process write only 64 KiB into a file."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from pbe.store import Store, StoreError\n"
        "store = Store(sys.argv[1]); store.write_bytes('parts/a/small', b'x' * 1000)\n"
        "try: store.write_bytes('parts/a/large', b'x' * 1000000)\n"
        "except StoreError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repo_root())
    assert "parts/a/large: cannot be written: File too large; finished parts are kept" in result.stdout
    assert [path.name for path in (tmp_path / "store" / "parts" / "a").iterdir()] == ["small"]
