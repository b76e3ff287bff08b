"""Which photo a name means: every spelling that fits a single photo, and no photo for what could mean two."""

import unicodedata
from unittest.mock import patch

import pyarrow as pa
import pytest

from pbe.data.boxfiles import photo_names
from pbe.data.boxfiles.photo_names import WITH_ZEROS, PhotoNames, invalid_ids
from pbe.data.schema import PHOTOS


def _names(*addresses: str) -> PhotoNames:
    """Of a folder of photos, as FolderSource lists it."""
    rows = [
        {"image_id": address.rpartition("/")[2].rpartition(".")[0], "address": address, "version": ""}
        for address in addresses
    ]
    return PhotoNames(pa.Table.from_pylist(rows, schema=PHOTOS))


def _ids(names: PhotoNames, *called: str) -> list[str]:
    return names.ids(pa.array(called, pa.string())).to_pylist()


NFC, NFD = (unicodedata.normalize(form, "café-1") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("called", "address", "image_id"),
    [
        (" p0.JPG ", "p0.png", "p0"),  # a data set that was converted
        ("train/p0.jpg", "train/p0.jpg", "p0"),
        ("train\\p0", "train/p0.jpg", "p0"),
        ("./train//p0.jpg", "train/p0.jpg", "p0"),
        ("/home/me/photos/train/p0.jpg", "train/p0.jpg", "p0"),
        ("C:\\photos\\p0.jpg", "p0.jpg", "p0"),
        ("p0.jpg", "deep/er/p0.jpg", "p0"),
        ("file:///me/train/p0.jpg", "train/p0.jpg", "p0"),
        ("/data/local-files/?d=train/p0.jpg", "train/p0.jpg", "p0"),
        ("train2017/p0.jpg", "photos/p0.jpg", "p0"),  # a name alone, where no other path could mean it
        (NFC, f"{NFD}.jpg", NFD),
        (NFD, f"{NFC}.jpg", NFC),
        (f"{NFC}/p0.jpg", f"{NFD}/p0.jpg", "p0"),
        ("my%20cup.jpg", "my cup.jpg", "my cup"),
        ("caf%C3%A9-1.jpg", f"{NFD}.jpg", NFD),
        ("train%2Fp0.jpg", "train/p0.jpg", "p0"),
        ("50%25.jpg", "50%25.jpg", "50%25"),  # as it is comes first
        ("12", "0012.jpg", "0012"),
        ("12.0", "0012.jpg", "0012"),
        ("0", "000.jpg", "000"),
        ("12.0", "12.jpg", "12"),
    ],
)
def test_a_name_finds_its_photo(called: str, address: str, image_id: str) -> None:
    names = _names("other.jpg", address, "another/x.jpg")
    assert _ids(names, called, "other", called) == [image_id, "other", image_id]
    assert not list(names.ambiguous())
    assert names.photos().column("image_id").to_pylist() == ["other", image_id, "x"]


@pytest.mark.parametrize(
    ("called", "addresses"),
    [
        ("P0", ["p0.jpg"]),  # another case is another name
        ("0012", ["12.jpg"]),  # spreadsheets add no zeros
        ("12.jpg", ["0012.jpg"]),  # and take none from a file name
        ("12", ["012.jpg", "0012.jpg"]),
        ("../p0.jpg", ["p0.jpg"]),
        ("x/p0.jpg", ["a/p0.jpg", "b/p0.jpg"]),
        ("1" * 5000, ["1.jpg"]),
    ],
)
def test_a_name_that_fits_none_or_several_stays_as_it_is(called: str, addresses: list[str]) -> None:
    names = _names(*addresses)
    (found,) = _ids(names, called)
    assert found not in names.photos().column("image_id").to_pylist()


def test_paths_and_suffixes_tell_photos_of_one_name_apart_and_their_ids_are_made_of_the_path() -> None:
    names = _names("train/p0.jpg", "val/p0.jpg", "both.jpg", "both.png", "q.jpg", "x/q.jpg", "1/same.jpg", "2/same.jpg")
    called = ["train/p0.jpg", "/data/val/p0.jpg", "both.jpg", "both.PNG", "q.jpg", "x/q", "same.jpg"]
    wanted = ["train__p0", "val__p0", "both_jpg", "both_png", "q", "x__q", "same"]
    assert _ids(names, *called) == wanted
    assert names.photos().column("image_id").to_pylist() == [*wanted[:6], "same", "same"]
    assert not list(names.ambiguous()) and not pa.compute.any(invalid_ids(pa.array(wanted))).as_py()


def test_names_of_two_photos_never_become_one_without_a_word() -> None:
    for addresses, called in (
        (["p0.jpg"], ["train/p0.jpg", "val/p0.jpg"]),
        (["x/p0.jpg"], ["train/p0.jpg", "val/p0.jpg"]),
        (["0012.jpg"], ["12", "0012"]),
    ):
        names = _names(*addresses)
        found = [_ids(names, name)[0] for name in called]  # as of two blocks of a file
        ((image_id, why),) = names.ambiguous()
        assert image_id in found and "could mean either" in why
    assert names.counts() == {WITH_ZEROS: 1}
    unlisted = PhotoNames()
    assert _ids(unlisted, "train/a", "validation/a", "train/b") == ["a", "a", "b"]
    assert [image_id for image_id, _ in unlisted.ambiguous()] == ["a"]


def test_a_path_that_fits_comes_before_one_that_does_not() -> None:
    names = _names("train/p0.jpg")
    assert _ids(names, "val/p0.jpg", "train/p0.jpg") == ["val/p0", "p0"]
    assert not list(names.ambiguous())
    assert names.missing(pa.array(["val/p0", "p0", "../p0", "a\n/b"])).to_pylist() == [True, False, False, False]


def test_where_every_folder_has_the_same_file_a_name_needs_no_look_at_each() -> None:
    addresses = [f"scene{number}/rgb.png" for number in range(256)]
    with patch.object(photo_names, "_name_of", wraps=photo_names._name_of) as parse:
        assert _ids(_names(*addresses), *addresses) == [f"scene{number}__rgb" for number in range(256)]
    assert parse.call_count < 256 * 20


@pytest.mark.parametrize("image_id", ["", "..", "a/b", "a\\b", "a\x00", "a\x7f", "a\x9b31m", "x" * 201])
def test_an_id_is_safe_as_a_name_of_a_file_and_on_a_terminal(image_id: str) -> None:
    assert invalid_ids(pa.array([image_id, "café (1)…"])).to_pylist() == [True, False]
