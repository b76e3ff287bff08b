"""Features of pictures: one for each, finite, and an error that names the picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pbe.data.images import encode_png
from pbe.data.masks import pack_mask
from pbe.data.schema import FEATURES, PIXELS, require
from pbe.evaluate.bench.scopes import scopes_of
from pbe.evaluate.features.crops import Crop, bench_crops, edited_crops, median_hole_px, square
from pbe.evaluate.features.extractors import Preprocessing
from pbe.evaluate.features.lpips import load_lpips
from pbe.evaluate.features.tables import FeatureTable, PixelTable, count_pixels, extract
from tests.tiny_weights import write_lpips


class _Extractor:
    name = digest = resize_rule = "extractor"
    matches_resolution = paper = cmmds_network = False
    ran: Sequence[np.ndarray] = ()

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        self.ran = [*self.ran, *images]
        return np.array([[float(image.mean()), np.nan if image.max() == 255 else 1.0] for image in images])


def _view(key: str, value: int) -> Crop:
    return Crop(key, "whole", "whole", np.full((4, 4, 3), value, np.uint8))


def test_a_picture_whose_features_are_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"extractor gives values that are not finite for b\.png \(whole\)"):
        extract([_view("a.png", 1), _view("b.png", 255)], _Extractor(), batch_rows=4)


def test_equal_pictures_are_run_once_and_each_has_its_row() -> None:
    extractor = _Extractor()
    other = Crop("d", "whole", "whole", np.full((2, 8, 3), 1, np.uint8))  # the same bytes in another shape
    crops = [_view("a", 1), _view("b", 2), _view("c", 1), other, _view("e", 2)]
    table = FeatureTable([extract(crops, extractor, batch_rows=3)])
    assert [picture.shape for picture in extractor.ran] == [(4, 4, 3), (4, 4, 3), (2, 8, 3)]
    assert table.of(["a", "b", "c", "d", "e"], "whole")[:, 0].tolist() == [1, 2, 1, 1, 2]


def test_what_was_made_from_a_caption_is_compared_with_the_exemplar_that_it_describes() -> None:
    source, red = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), (200, 10, 20), np.uint8)
    hole_mask = np.zeros((8, 8), np.uint8)
    hole_mask[2:6, 2:6] = 1
    item = {"source": encode_png(source), "exemplar": encode_png(red), "box_hole_mask": pack_mask(hole_mask)}
    kinds: tuple[Any, ...] = ("exemplar", "label", "own")
    assert scopes_of(item, ["box"], kinds) == [("box", "exemplar"), ("box", "label")]
    edits = [
        {"bench_id": "a", "hole_kind": "box", "reference_kind": kind, "seed": 1, "edit": encode_png(red)}
        for kind in ("label", "label_colour", "exemplar")
    ]
    rows = [{**row, "reference_kind": ""} for row in count_pixels(edits, {"a": item}).to_pylist()]
    assert rows[0] == rows[1] == rows[2] and rows[0]["reference_r"] == 200


NEUTRAL = [124, 116, 104]


def _item() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A row of BENCH with box and Bezier holes of 4 x 4 px, of which the Bezier has all but a corner. Its photo and
    exemplar; the exemplar's object is its left half."""
    photo, exemplar = (np.random.default_rng(seed).integers(0, 120, (8, 8, 3)).astype(np.uint8) for seed in (0, 1))
    box, half = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    box[2:6, 2:6], half[:, :4] = 1, 1
    bezier = box.copy()
    bezier[5, 5] = 0
    item = {"bench_id": "a", "source": encode_png(photo), "exemplar": encode_png(exemplar), "own": encode_png(photo)}
    masks = {"box_hole_mask": box, "bezier_hole_mask": bezier, "exemplar_object_mask": half}
    return item | {name: pack_mask(mask) for name, mask in masks.items()}, photo, exemplar


def test_what_a_mask_hides_is_neutral_and_a_box_has_no_masked_view() -> None:
    item, photo, exemplar = _item()
    scopes: list[Any] = [(hole, kind) for hole in ("box", "bezier") for kind in ("exemplar", "own")]
    found = {
        crop.view: crop.picture for crop in bench_crops([item], scopes, matched=False, median_px=4, region="whole")
    }
    of_holes = {f"{hole}/{kind}" for hole, kind in scopes} | {"box/region", "bezier/region", "bezier/masked"}
    assert set(found) == {"source", "exemplar", "bezier/exemplar/masked", *of_holes}  # of `own` no mask is known
    np.testing.assert_array_equal(found["bezier/region"], photo[2:6, 2:6])
    masked, object_alone = found["bezier/masked"], found["bezier/exemplar/masked"]
    assert masked[3, 3].tolist() == NEUTRAL
    masked[3, 3] = photo[5, 5]
    np.testing.assert_array_equal(masked, photo[2:6, 2:6])
    np.testing.assert_array_equal(object_alone[:, :4], exemplar[:, :4])
    assert (object_alone[:, 4:] == NEUTRAL).all()


def test_exemplars_share_one_size_for_retrieval_and_have_their_regions_size_for_similarity() -> None:
    item = _item()[0]
    wide = np.zeros((8, 8), np.uint8)
    wide[:, :2] = 1
    rows = [item, {**item, "bench_id": "b", "box_hole_mask": pack_mask(wide)}]
    crops = bench_crops(rows, [("box", "exemplar")], matched=True, median_px=median_hole_px(rows), region="whole")
    found = {(crop.key, crop.view): crop.picture for crop in crops}
    assert [found[key, "exemplar"].shape for key in ("a", "b")] == [(4, 4, 3)] * 2
    assert [found[key, "box/exemplar"].shape for key in ("a", "b")] == [(4, 4, 3), (8, 2, 3)]


def test_edits_are_seen_through_their_holes_but_for_fills_that_are_not_scored_themselves() -> None:
    item = _item()[0]
    edits = [
        {"bench_id": "a", "hole_kind": hole, "reference_kind": kind, "seed": 1, "edit": item["source"]}
        for hole, kind in (("box", "exemplar"), ("bezier", "exemplar"), ("bezier", "foreign"))
    ]
    found = [(crop.key, crop.view) for crop in edited_crops(edits, {"a": item}, region="whole")]
    views = [("box|exemplar", ["whole", "region"]), ("bezier|exemplar", ["whole", "region", "masked"])]
    views.append(("bezier|foreign", ["region"]))
    assert found == [(f"a|{scope}|1", view) for scope, of_edit in views for view in of_edit]
    upstreams = {crop.view: crop.picture for crop in edited_crops(edits[1:2], {"a": item}, region="upstream")}
    assert upstreams["masked"].shape == (4, 4, 3) and upstreams["region"].shape == (3, 2, 3)


def test_the_first_view_that_a_key_has_is_read() -> None:
    rows = [("a", "x", 1), ("a", "y", 2), ("b", "y", 3)]
    table = [{"key": key, "view": view, "vector": np.full(2, value, "<f4").tobytes()} for key, view, value in rows]
    features = FeatureTable([pa.Table.from_pylist(table, schema=FEATURES)])
    assert features.of_first(["b", "a"], ["x", "y"])[:, 0].tolist() == [3, 1]
    assert features.keys_of("y") == ["a", "b"] and features.all_of("y")[:, 0].tolist() == [2, 3]
    with pytest.raises(KeyError):
        features.of_first(["b"], ["x"])


def test_lpips_has_columns_where_it_is_measured_alone(tmp_path: Path) -> None:
    source, hole_mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    hole_mask[2:6, 2:6] = 1
    edit = source.copy()
    edit[30:, 30:] = 255
    item = {"source": encode_png(source), "exemplar": encode_png(edit), "box_hole_mask": pack_mask(hole_mask)}
    edits = [
        {"bench_id": "a", "hole_kind": "box", "reference_kind": "exemplar", "seed": seed, "edit": encode_png(picture)}
        for seed, picture in enumerate((source, edit))
    ]
    plain = count_pixels(edits, {"a": item})
    counts = count_pixels(edits, {"a": item}, lpips=load_lpips("alex", *write_lpips(tmp_path, "alex")))
    names = ["background_lpips_alex", "hole_lpips_alex"]
    assert [name for name in counts.column_names if name not in plain.column_names] == names
    assert plain.equals(counts.drop_columns(names))
    assert (
        counts.column("background_lpips_alex").to_pylist()[0] == 0 < counts.column("background_lpips_alex")[1].as_py()
    )
    assert PixelTable([require(plain, PIXELS, "")]).lpips == []
    assert PixelTable([require(counts, PIXELS, "")]).lpips == names


def test_real_images_are_squared_as_by_upstreams_script() -> None:
    """scripts/create_square_gt_for_fid.py, written again: the longer side is rounded down, the offset to even."""
    photo = np.random.default_rng(0).integers(0, 256, (427, 640, 3)).astype(np.uint8)
    whole = np.array(Image.fromarray(photo).resize((767, 512), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(square(photo, 512), whole[:, 128 : 128 + 512])


def test_two_pictures_of_one_name_are_not_silently_one() -> None:
    rows = [{"key": "a.png", "view": "whole", "vector": np.full(2, value, "<f4").tobytes()} for value in (1, 2)]
    with pytest.raises(ValueError, match="1 rows repeat the key and view of another"):
        FeatureTable([pa.Table.from_pylist([row], schema=FEATURES) for row in rows])
