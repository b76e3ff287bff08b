"""The contracts hold: a table has exactly the columns of its schema, and shapes travel with array columns."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe.data.masks import HOLE_KINDS
from pbe.data.schema import (
    BENCH,
    BOXES,
    EDITS,
    IMAGES,
    REJECTS,
    TRIPLETS,
    array_bytes,
    array_field,
    array_shape,
    array_value,
    encoded_schema,
    picture_field,
    require,
    table_from_rows,
)
from pbe.settings import Dtype
from pbe.store import Store

ALL = {"images": IMAGES, "boxes": BOXES, "rejects": REJECTS, "triplets": TRIPLETS, "bench": BENCH, "edits": EDITS}
ALL["encoded"] = encoded_schema((16, 8, 8), (2, 1, 1280))


def test_an_exact_table_passes_and_is_returned() -> None:
    for schema in ALL.values():
        table = schema.empty_table()
        assert require(table, schema, "here") is table


def test_any_other_table_is_refused_with_its_place_and_column() -> None:
    schema = IMAGES
    table, first = schema.empty_table(), schema[0]
    wrong_type = schema.set(0, pa.field(first.name, pa.date32(), nullable=first.nullable)).empty_table()
    for wrong, words in (
        (table.drop_columns([first.name]), ["missing", first.name]),
        (table.append_column("extra", pa.array([], pa.int8())), ["unknown", "extra"]),
        (wrong_type, ["wrong", first.name, "date32"]),
        (table.select(list(reversed(schema.names))), []),
        (schema.set(0, first.with_nullable(not first.nullable)).empty_table(), []),
    ):
        with pytest.raises(ValueError, match=r"^parts/x\.parquet: ") as caught:
            require(wrong, schema, "parts/x.parquet")
        assert all(word in str(caught.value) for word in words)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), st.sampled_from(["float16", "float32"]))
def test_an_array_field_holds_values_of_its_type_and_shape(shape: tuple[int, ...], dtype: Dtype) -> None:
    field = array_field("x", shape, dtype)
    assert array_shape(field) == shape
    assert field.type == pa.binary(np.dtype(dtype).itemsize * int(np.prod(shape))) and not field.nullable
    values = np.random.default_rng(0).standard_normal(shape)
    assert array_bytes(field, values) == values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    read = array_value(field, array_bytes(field, values))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(dtype).astype(np.float32))


def test_any_other_field_holds_no_array() -> None:
    with pytest.raises(ValueError, match="column image_id holds no array"):
        array_shape(IMAGES.field("image_id"))
    with pytest.raises(ValueError, match="column bytes holds no array"):
        array_value(IMAGES.field("bytes"), b"")


def test_shapes_survive_the_storage(store: Store) -> None:
    schema = pa.schema([array_field("x", (3, 2))])
    values = np.arange(12).reshape(2, 3, 2)
    table = pa.table([pa.array([array_bytes(schema[0], value) for value in values], schema[0].type)], schema=schema)
    again = store.read_table(store.write_unit("s", "u", {"d": table}, counts={}).file("d"))
    assert array_shape(again.schema.field("x")) == (3, 2)
    got = [array_value(again.schema.field("x"), value) for value in again.column("x").to_pylist()]
    np.testing.assert_array_equal(got, values)


def test_encoded_columns_have_the_shapes_of_latents_masks_and_tokens() -> None:
    shapes = {field.name: array_shape(field) for field in ALL["encoded"] if field.metadata}
    assert shapes.pop("exemplar_tokens") == shapes.pop("pair_tokens") == (2, 1, 1280)
    assert {shapes.pop(f"{kind}_hole_mask_latent") for kind in HOLE_KINDS} == {(1, 8, 8)}
    assert len(shapes) == 8 and set(shapes.values()) == {(16, 8, 8)}


SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("blob", pa.binary()), pa.field("size", pa.int32())])


@pytest.mark.parametrize("blobs", [[], [b""], [b"a", b"", b"ccc"], [b"a", None, b"b"], [None]], ids=str)
def test_the_table_is_what_pyarrow_makes_of_the_rows(blobs: list[bytes | None]) -> None:
    rows = [{"name": f"{number}", "blob": blob, "size": number} for number, blob in enumerate(blobs)]
    table = table_from_rows(rows, SCHEMA)
    table.validate(full=True)
    assert table.equals(pa.Table.from_pylist(rows, schema=SCHEMA)) and table.schema == SCHEMA


def test_a_key_that_a_row_lacks_is_null() -> None:
    assert table_from_rows([{"name": "a"}], SCHEMA).to_pylist() == [{"name": "a", "blob": None, "size": None}]


def test_the_storage_compresses_everything_but_pictures(store: Store) -> None:
    schema = pa.schema([picture_field("picture"), pa.field("mask", pa.binary()), pa.field("name", pa.string())])
    rows = [{"picture": b"p" * 1000, "mask": b"m" * 1000, "name": "n" * 1000}]
    record = store.write_unit("materialize", "unit", {"all": table_from_rows(rows, schema)}, counts={})
    group = pq.read_metadata(store.path(record.file("all").path)).row_group(0)
    codecs = {group.column(index).path_in_schema: group.column(index).compression for index in range(3)}
    assert codecs == {"picture": "UNCOMPRESSED", "mask": "ZSTD", "name": "ZSTD"}
    assert store.read_table(record.file("all")).to_pylist() == rows


def test_photos_are_pictures_and_rejects_hold_none() -> None:
    assert IMAGES.field("bytes").equals(picture_field("bytes"), check_metadata=True)
    assert not any(field.metadata for field in REJECTS)
