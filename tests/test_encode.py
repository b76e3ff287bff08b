"""Encoding: the network's inputs for each row of a triplet table, with any codec and backbone."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pbe.data import images
from pbe.data.masks import keep_mask_latent, pack_mask
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.schema import TRIPLETS, array_value, encoded_schema, require
from pbe.encode import (
    EncodeError,
    encode_masked,
    encode_references,
    encode_source,
    encode_triplets,
    to_images,
    to_pixels,
)
from pbe.model.backbone import EfficientNetLite
from pbe.model.codec import PatchCodec
from pbe.model.settings import Tokens
from pbe.settings import Dtype

SIZE_PX, DRAWS, SEED = 16, 3, 23


def _holes(count: int) -> np.ndarray:
    hole_masks = np.zeros((count, SIZE_PX, SIZE_PX), np.uint8)
    for index in range(count):
        hole_masks[index, 2 : 6 + index, 3:12] = 1
    return hole_masks


def _reference(index: int) -> np.ndarray:
    coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return images.resize(coarse, width_px=224, height_px=224)


def _triplets(crops: np.ndarray, rows: list[int]) -> pa.Table:
    """Rows of a TRIPLETS table; row k shows crop k, and rows k and k + 2 share a reference."""
    return pa.Table.from_pylist(
        [
            {
                "image_id": f"image{k}",
                "slot": 5,
                "box_index": k % 2,
                "label_name": "Cat",
                "source": images.encode_jpeg(crops[k], 95),
                "box_hole_mask": pack_mask(_holes(4)[k]),
                "bezier_hole_mask": pack_mask(_holes(4)[k].T),
                "reference": images.encode_jpeg(_reference(k % 2), 95),
                **dict.fromkeys(("box_x0_px", "box_y0_px"), 1.0),
                **dict.fromkeys(("box_x1_px", "box_y1_px"), 9.0),
            }
            for k in rows
        ],
        schema=TRIPLETS,
    )


def _encode(
    triplets: pa.Table,
    codec: PatchCodec,
    backbone: EfficientNetLite,
    draws: int = DRAWS,
    dtype: Dtype = "float16",
    tokens: Tokens = "class",
) -> pa.Table:
    return encode_triplets(
        triplets,
        image_px=SIZE_PX,
        codec=codec,
        backbone=backbone,
        tokens=tokens,
        augmenter=make_augmenter(),
        draws=draws,
        batch_rows=3,
        seed=SEED,
        clean_tokens={},
        dtype=dtype,
    )


def _arrays(table: pa.Table) -> list[dict[str, np.ndarray]]:
    return [
        {field.name: array_value(field, row[field.name]) for field in table.schema if field.metadata}
        for row in table.to_pylist()
    ]


@pytest.fixture(scope="module")
def triplets(crops: np.ndarray) -> pa.Table:
    return _triplets(crops, [0, 1, 2, 3])


@pytest.fixture(scope="module")
def encoded(triplets: pa.Table, codec: PatchCodec, backbone: EfficientNetLite) -> pa.Table:
    return _encode(triplets, codec, backbone)


def test_pixels_and_images_are_inverse_and_in_range(crops: np.ndarray) -> None:
    every_value = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    for uint8 in (every_value, crops):
        pixels = to_pixels(uint8)
        assert pixels.dtype == torch.float32 and pixels.shape == (len(uint8), 3, 16, 16)
        assert pixels.min() >= -1 and pixels.max() <= 1
        np.testing.assert_array_equal(to_images(pixels), uint8)
    assert to_pixels(every_value)[0, 0, [0, -1], [0, -1]].tolist() == [-1, 1]


def test_images_are_rounded_and_clamped() -> None:
    values = torch.tensor([-3.0, -1 + 1.6 / 127.5, -1 + 1.4 / 127.5, 3.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_images(values)[0, :, :, 0].tolist() == [[0, 2], [1, 255]]
    assert to_images(values, levels="below")[0, :, :, 0].tolist() == [[0, 1], [1, 255]]


def test_what_the_hole_hides_does_not_matter_and_is_mid_grey(codec: PatchCodec, crops: np.ndarray) -> None:
    holes = _holes(len(crops))
    masked, keep = encode_masked(codec, crops, holes)
    other = np.where(holes[..., None] > 0, 255 - crops, crops)
    assert torch.equal(encode_masked(codec, other, holes)[0].mean, masked.mean)
    assert not torch.allclose(encode_source(codec, crops).mean, masked.mean, atol=0.1)
    grey = to_pixels(crops)
    grey[torch.from_numpy(holes)[:, None].expand_as(grey) > 0] = 0.0  # 0 in [-1, 1]
    torch.testing.assert_close(masked.mean, codec.posterior(grey)[0])
    np.testing.assert_array_equal(keep.numpy(), [keep_mask_latent(mask, codec.patch_px) for mask in holes])


def test_without_a_hole_the_masked_photo_is_the_photo(codec: PatchCodec, crops: np.ndarray) -> None:
    masked, keep = encode_masked(codec, crops, np.zeros((len(crops), SIZE_PX, SIZE_PX), np.uint8))
    source = encode_source(codec, crops)
    assert torch.equal(masked.mean, source.mean) and torch.equal(masked.std, source.std) and (keep == 1).all()


def test_all_tokens_are_the_pooled_one_and_every_cell(
    triplets: pa.Table, encoded: pa.Table, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    table = _encode(triplets, codec, backbone, tokens="all")
    require(table, encoded_schema((codec.channels, 4, 4), (DRAWS, 50, 1280)), "encoded")
    for row, one in zip(_arrays(table), _arrays(encoded), strict=True):
        np.testing.assert_allclose(row["exemplar_tokens"][:, :1], one["exemplar_tokens"], atol=2e-3, rtol=2e-3)
        cells = row["exemplar_tokens"][:, 1:]
        np.testing.assert_allclose(cells.mean(axis=1), row["exemplar_tokens"][:, 0], atol=2e-2, rtol=2e-2)
        assert (cells.std(axis=1) > 0).any()


def test_rows_keep_their_order_and_identity_and_fit_the_schema(encoded: pa.Table, codec: PatchCodec) -> None:
    require(encoded, encoded_schema((codec.channels, 4, 4), (DRAWS, 1, 1280)), "encoded")
    assert encoded.column("image_id").to_pylist() == [f"image{k}" for k in range(4)]
    assert encoded.column("box_index").to_pylist() == [0, 1, 0, 1]
    assert encoded.column("slot").to_pylist() == [5] * 4


def test_every_column_is_what_its_name_says_to_half_precision(
    encoded: pa.Table, triplets: pa.Table, codec: PatchCodec
) -> None:
    for k, (row, triplet) in enumerate(zip(_arrays(encoded), triplets.to_pylist(), strict=True)):
        source = images.decode(triplet["source"])[None]
        posterior = encode_source(codec, source)
        np.testing.assert_allclose(row["source_mean"], posterior.mean[0], atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(row["source_std"], posterior.std[0])
        for kind, hole in (("box", _holes(4)[k]), ("bezier", _holes(4)[k].T)):
            masked, keep = encode_masked(codec, source, hole[None])
            np.testing.assert_allclose(row[f"{kind}_masked_mean"], masked.mean[0], atol=2e-3, rtol=1e-3)
            np.testing.assert_array_equal(row[f"{kind}_hole_mask_latent"], 1 - keep[0].numpy())


def test_draw_zero_is_the_clean_reference_and_the_others_are_augmented(
    encoded: pa.Table, triplets: pa.Table, backbone: EfficientNetLite
) -> None:
    rows, augmenter = _arrays(encoded), make_augmenter()
    for row, triplet in zip(rows, triplets.to_pylist(), strict=True):
        reference = images.decode(triplet["reference"])
        wanted = [reference] + [
            augment_reference(
                reference, augmenter=augmenter, rng=row_rng(SEED, triplet["image_id"], 5, "reference", draw)
            )
            for draw in range(1, DRAWS)
        ]
        expected = encode_references(backbone, np.stack(wanted)).numpy()
        np.testing.assert_allclose(row["exemplar_tokens"], expected, atol=2e-3, rtol=2e-3)
    tokens = np.stack([row["exemplar_tokens"] for row in rows])
    np.testing.assert_array_equal(tokens[:2, 0], tokens[2:, 0])  # one box, one clean reference
    assert not np.array_equal(tokens[:2, 0], tokens[[1, 0], 0])
    assert len({draw.tobytes() for draw in tokens[:, 1:].reshape(8, -1)}) > 4  # rows of a box draw independently


def test_a_row_does_not_depend_on_the_others_or_on_their_order(
    encoded: pa.Table, crops: np.ndarray, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    """Equal up to the last bits of the backbone's sums, which depend on the batch."""
    rows = _arrays(encoded)
    for k, row in zip([3, 1], _arrays(_encode(_triplets(crops, [3, 1]), codec, backbone)), strict=True):
        for name, value in row.items():
            np.testing.assert_allclose(value, rows[k][name], atol=2e-3, rtol=2e-3)


def test_float32_keeps_what_float16_rounds(
    encoded: pa.Table, triplets: pa.Table, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    exact = _encode(triplets, codec, backbone, dtype="float32")
    require(exact, encoded_schema((codec.channels, 4, 4), (DRAWS, 1, 1280), "float32"), "encoded")
    for half, full, triplet in zip(_arrays(encoded), _arrays(exact), triplets.to_pylist(), strict=True):
        posterior = encode_source(codec, images.decode(triplet["source"])[None])
        np.testing.assert_allclose(full["source_mean"], posterior.mean[0], atol=1e-6)
        assert np.abs(half["source_mean"] - posterior.mean[0].numpy()).max() > 1e-5
        for name, value in full.items():
            np.testing.assert_array_equal(value.astype(np.float16), half[name])


def test_values_that_the_stored_type_cannot_hold_are_an_error(
    triplets: pa.Table, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    large = PatchCodec(codec.mean, codec.basis, codec.rms * 1e-6, codec.border)
    with pytest.raises(EncodeError, match=r"slot \d+: \w+ has .* too large values for float16; .* float32"):
        _encode(triplets, large, backbone)
    _encode(triplets, large, backbone, dtype="float32")


def test_the_same_call_gives_the_same_bytes(
    encoded: pa.Table, triplets: pa.Table, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    assert _encode(triplets, codec, backbone).equals(encoded)


def test_the_cache_of_clean_tokens_is_filled_and_used(
    triplets: pa.Table, crops: np.ndarray, codec: PatchCodec, backbone: EfficientNetLite
) -> None:
    marker = np.full((1, 1280), 7, np.float32)
    first, second = triplets.column("reference").to_pylist()[:2]
    cache = {first: marker}
    table = encode_triplets(
        triplets,
        image_px=SIZE_PX,
        codec=codec,
        backbone=backbone,
        tokens="class",
        augmenter=make_augmenter(),
        draws=1,
        batch_rows=2,
        seed=SEED,
        clean_tokens=cache,
    )
    assert set(cache) == {first, second}
    tokens = [row["exemplar_tokens"] for row in _arrays(table)]
    assert all((token == 7).all() for token in tokens[::2]) and not any((token == 7).all() for token in tokens[1::2])


def test_no_rows_give_an_empty_table(crops: np.ndarray, codec: PatchCodec, backbone: EfficientNetLite) -> None:
    table = _encode(_triplets(crops, []), codec, backbone)
    require(table, encoded_schema((codec.channels, 4, 4), (DRAWS, 1, 1280)), "encoded")
    assert table.num_rows == 0
