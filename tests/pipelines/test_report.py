"""The report and the summary: arithmetic, wording, and the list of deviations, on values made here."""

import copy
import json
import shlex
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import yaml
from jinja2 import Environment, nodes
from markupsafe import Markup
from pydantic import BaseModel

from pbe.config import Params
from pbe.data import images
from pbe.data.filter import RULES, FilterConfig
from pbe.data.masks import pack_mask
from pbe.data.reference import augment_reference, make_augmenter
from pbe.data.rng import row_rng
from pbe.data.schema import REJECTS, TRIPLETS
from pbe.evaluate.metrics.intervals import Estimate
from pbe.evaluate.settings import BaselineConfig
from pbe.store import Manifest, Store, make_manifest
from pipelines import report
from pipelines.reporting import deviations, published, summary
from pipelines.reporting.charts import areas_svg, classes_svg, loss_svg
from pipelines.reporting.metric_glossary import bars, how_to_read, verdict
from pipelines.runtime.stage import Stage, StageError
from tests.profiles import profile_mapping

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = profile_mapping("tiny")


def params(*changes: tuple[str, object]) -> Params:
    """The tiny profile with ("section.key", value) changes."""
    raw = copy.deepcopy(TINY)
    for path, value in changes:
        *folders, key = path.split(".")
        at = raw
        for folder in folders:
            at = at[folder]
        at[key] = value
    return Params.model_validate(raw)


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, n=12, clusters=4, method="95% percentile bootstrap of 4 whole groups")


def topics(found: Params, train_photos: int = 8) -> dict[str, deviations.Deviation]:
    return {d.topic: d for d in deviations.deviations(found, train_photos=train_photos)}


# -- deviations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "key", "as_the_paper"),
    [
        ("objective", "train.objective", "eps"),
        ("noise schedule", "train.beta_schedule", "scaled_linear"),
        ("class embedding", "train.unet.class_embedding", False),
        ("picture size", "materialize.image_px", 512),
        ("guidance scale", "edit.guidance_scale", 5.0),
        ("points of a Bezier hole", "materialize.bezier_points_per_side", 20),
        ("levels of the decoded picture", "edit.protocol", "upstream"),
        ("stored latents", "encode.dtype", "float32"),
        ("stored latents", "train.input", "pixels"),
        ("warm-up", "train.warmup_steps", 0),
    ],
)
def test_a_deviation_is_listed_while_its_setting_holds(topic: str, key: str, as_the_paper: object) -> None:
    assert topic in topics(params())
    assert topic not in topics(params((key, as_the_paper)))


@pytest.mark.parametrize(
    ("topic", "key", "other"),
    [
        ("hole kinds", "train.hole_probs", {"box": 0.0, "bezier": 1.0}),
        ("reference augmentation off", "train.reference_augmentation", False),
        ("box filter", "filter.max_area_frac", 0.9),
        ("number format", "train.precision", "bf16_autocast"),
        ("padding of the reference", "materialize.reference_pad_px", 0),
        ("growth of the box hole, as a fraction of the room", "materialize.box_extend_frac", 0.2),
        ("crops sized to their boxes", "materialize.context_factor", 2.0),
        ("shrinking of the crop, as a fraction of the free margin", "materialize.crop_shrink_frac", 0.0),
        ("jitter of a Bezier hole", "materialize.bezier_jitter_px", 0),
        ("reference size", "materialize.reference_px", 128),
        ("background of the reference", "materialize.reference_background", "white"),
        ("more filter rules", "filter.min_side_px", 32),
        ("more filter rules", "filter.exclude_flags", ["is_group_of"]),
    ],
)
def test_a_setting_of_the_paper_is_not_a_deviation(topic: str, key: str, other: object) -> None:
    assert topic not in topics(params())
    assert topic in topics(params((key, other)))


def test_steps_that_do_not_divide_1000_are_a_deviation_but_by_upstreams_protocol() -> None:
    topic, leading = "steps that do not divide 1000", ("train.beta_schedule", "scaled_linear")
    assert topic not in topics(params(leading, ("edit.steps", 50)))
    assert topic not in topics(params(("edit.steps", 30)))  # its schedule, not the paper's, is spaced otherwise
    found = topics(params(leading, ("edit.steps", 30)))[topic]
    assert found.here == "30 timesteps, from 958 on" and found.original == "31: one in 33 of all 1000"
    assert topic not in topics(params(leading, ("edit.steps", 30), ("edit.protocol", "upstream")))
    unipc = ("edit.sampler", "unipc")
    assert topic in topics(params(leading, ("edit.steps", 30), ("edit.protocol", "upstream"), unipc))


def test_a_deviation_of_one_variant_names_it() -> None:
    other = {"train": {"context_dropout_prob": 0.0}}
    found = topics(params(("variants", {"full": {}, "none": other})))["context dropout"]
    assert (found.variants, found.here) == ("full", "30% of rows see none of the photo")
    both = topics(params(("sweep.variant", "a"), ("variants", {"a": {}, "b": {"train": {"lr": 1e-4}}})))
    assert both["context dropout"].variants == ""
    assert "context dropout" not in topics(
        params(("sweep.variant", "a"), ("variants", {"a": {"train": {"context_dropout_prob": 0.0}}}))
    )


def test_every_row_names_settings_that_exist_and_every_filter_rule_has_its_place() -> None:
    """Rows that hold for no profile would otherwise fail in somebody's report."""
    rows = yaml.safe_load(deviations.TABLE.read_text())
    keys = {key for row in rows for part in ("paper", "only") for key in row.get(part, {})}
    for key in keys:
        section, *rest = key.split(".")
        if rest:
            reduce(getattr, rest, getattr(params(), section))
    named = {key.removeprefix("filter.") for key in keys if key.startswith("filter.")}
    assert named == FilterConfig.model_fields.keys() - {"exclude_images"}  # upstream excludes images, too


def test_the_number_of_photos_counts() -> None:
    assert topics(params(), train_photos=8)["training photos"].here == "8"
    assert "training photos" not in topics(params(), train_photos=1_700_000)


# -- numbers -------------------------------------------------------------------------------------------------------


def test_a_metric_is_split_into_what_and_by_whom() -> None:
    assert how_to_read("exemplar_gain_efficientnet_lite0")[:2] == (
        "Exemplar gain",
        "efficientnet_lite0",
    )
    assert how_to_read("exemplar_gain_swap_clip")[:2] == ("Exemplar gain, swapped", "clip")
    assert how_to_read("colour_gain")[:2] == ("Colour gain", "")
    assert how_to_read("clip_fid")[:2] == how_to_read("fid")[:2] == ("Frechet distance", "")
    assert how_to_read("frechet_efficientnet_lite2")[:2] == ("Frechet distance", "efficientnet_lite2")
    assert how_to_read("frechet_fg_clip")[:2] == ("Frechet distance, hole crops", "clip")
    assert how_to_read("kid_masked_inception")[:2] == ("KID, through the mask", "inception")
    assert how_to_read("similarity_masked_clip")[:2] == ("Similarity, through the mask", "clip")
    for extractor in ("efficientnet_lite2", "clip", "inception"):
        for metric in summary.headline_metrics(extractor):
            assert how_to_read(metric)[3]
    with pytest.raises(KeyError, match="no sentence"):
        how_to_read("new_metric")


def test_a_number_with_a_chance_value_shows_it_beside_n(tmp_path: Path) -> None:
    numbers = {"retrieval_r1_x": asdict(estimate(0.5, 0.4, 0.6)) | {"extractor": "x", "chance": 1 / 12}}
    numbers["similarity_x"] = asdict(estimate(0.5, 0.4, 0.6)) | {"extractor": "x"}
    methods = {
        name: {"protocol": {}, "box": {"exemplar": numbers}} for name in (*params().variants, *params().baselines)
    }
    (tmp_path / "data" / "evaluate").mkdir(parents=True)
    (tmp_path / "data" / "evaluate" / "metrics.json").write_text(json.dumps({**methods, "card": {}}))
    results, _ = summary.load_results(tmp_path, params())
    similarity, first = report.metric_groups(results, ["x"])
    assert (similarity["label"], first["label"]) == ("Similarity", "Retrieval, first")
    assert similarity["lines"][0]["n"] == "12 in 4 photos" and first["lines"][0]["n"] == "12 in 4 photos; chance 0.0833"


def test_verdict_follows_the_interval_not_the_value() -> None:
    assert verdict(estimate(0.1, 0.01, 0.2)) == "above 0"
    assert verdict(estimate(0.1, -0.01, 0.2)) == "may be 0"
    assert verdict(estimate(0.1, 0.0, 0.2)) == "may be 0"
    assert verdict(estimate(-0.1, -0.2, -0.01)) == "below 0"


def test_bars_share_one_line_that_holds_zero() -> None:
    a, b = bars([("a", estimate(0.1, 0.05, 0.2)), ("b", estimate(0.4, 0.3, 0.5))])
    assert a.zero_pct == b.zero_pct
    assert 0 < a.zero_pct < a.low_pct < a.value_pct < a.high_pct < b.low_pct < b.high_pct < 100
    assert [bar.value_pct for bar in bars([("flat", estimate(0.0, 0.0, 0.0))])] == [50.0]


def _result(name: str, **metrics: float) -> summary.Result:
    numbers = {metric: estimate(value, value - 1, value + 1) for metric, value in metrics.items()}
    return summary.Result(name, {}, {("box", "exemplar"): numbers})


def test_the_table_has_the_papers_order_and_a_p_value_against_the_first() -> None:
    names = ["full", "mine", "bottleneck", "augmentation", "baseline", "copy_paste"]
    results = {name: _result(name, frechet_x=float(at), similarity_x=0.5) for at, name in enumerate(names)}
    tests = {"box": {"exemplar": {"frechet_x": {"p_value": 0.25}, "similarity_x": {"p_value": 0.0005}}}}
    paired = {"against": "full", "methods": dict.fromkeys(names, tests)}
    table = report.result_table(results, paired, "box", "x")
    assert table["columns"] == ["Frechet", "similarity"]
    in_order = ["baseline", "augmentation", "bottleneck", "full", "mine", "copy_paste"]
    assert [row["name"] for row in table["rows"]] == in_order
    assert [row["label"] for row in table["rows"]][:4] == [
        "baseline",
        "+ augmentation",
        "+ bottleneck",
        "+ classifier-free guidance (full)",
    ]
    baseline, full = table["rows"][0], table["rows"][3]
    assert baseline["cells"][0] == {"text": "4.00 [3.00, 5.00]", "p": "p 0.250"}
    assert [cell["p"] for cell in full["cells"]] == ["", ""]
    assert baseline["cells"][1]["p"] == "p 0.001"


def test_words_stand_above_the_picture_that_they_describe_with_p_values_of_their_own() -> None:
    results = {"full": _result("full", similarity_x=3.0, copy_paste=0.5)}
    assert report.caption_table(results, {"against": "full", "methods": {}}, "box", "x") is None
    scopes = {
        ("box", form): {"similarity_x": estimate(at, 0, 3)} for form, at in (("label_colour", 2.0), ("label", 1.0))
    }
    results["text"] = summary.Result("text", {}, scopes)
    tests = {form: {"similarity_x": {"p_value": p}} for form, p in (("label", 0.25), ("label_colour", 0.5))}
    paired = {"against": "full", "methods": {"full": {"box": {"exemplar": tests["label"]}}, "text": {"box": tests}}}
    table = report.caption_table(results, paired, "box", "x")
    assert table is not None and table["columns"] == ["similarity"]  # what no caption has is left out
    assert [(row["label"], row["cells"][0]["text"][:4], row["cells"][0]["p"]) for row in table["rows"]] == [
        ("text: label", "1.00", "p 0.250"),
        ("text: label and colour", "2.00", "p 0.500"),
        ("full: exemplar", "3.00", ""),
    ]
    assert [row["name"] for row in report.result_table(results, paired, "box", "x")["rows"]] == ["full"]


def test_a_plus_stands_only_below_the_row_to_which_it_adds() -> None:
    assert report.row_label("full", ["full", "baseline"]) == "full"
    assert report.row_label("augmentation", ["full", "baseline", "augmentation"]) == "+ augmentation"
    assert report.row_label("mine", [*report.TABLE_3, "mine"]) == "mine"


def test_methods_that_were_not_compared_have_no_p_value() -> None:
    results = {"full": _result("full", frechet_x=1.0), "theirs": _result("theirs", frechet_x=2.0)}
    paired = {"against": "full", "methods": {"full": {}, "theirs": {"not_compared": "other items"}}}
    rows = report.result_table(results, paired, "box", "x")["rows"]
    assert [row["cells"][0]["p"] for row in rows] == ["", ""]


def test_numbers_of_one_estimate_have_the_same_digits() -> None:
    assert summary.estimate_text(estimate(0.0123, -0.001, 0.02), signed=True) == "+0.012 [-0.001, +0.020]"
    assert summary.estimate_text(estimate(9.93, 5.96, 12.6)) == "9.9 [6.0, 12.6]"
    assert summary.estimate_text(estimate(-0.0001, -0.02, 0.0)) == "0.000 [-0.020, 0.000]"


def test_the_filter_table_has_the_rules_that_are_on_and_those_that_removed_something_in_their_order() -> None:
    counts = {f"rejected_{rule.reason}": 0 for rule in RULES} | {"rejected_area_below_min": 7}
    off = FilterConfig(min_area_frac=0.02, max_area_frac=0.8, exclude_images=(), max_heldout_similarity=None)
    assert report.filter_table(counts, off) == [("area below min", 7), ("area above max", 0)]
    assert report.filter_table({**counts, "rejected_near_duplicate": 2}, off)[-1] == ("near duplicate", 2)
    settings: dict[str, Any]
    for settings, reason in (
        ({"exclude_images": ("a",)}, "image excluded"),
        ({"max_heldout_similarity": 0.9}, "image like heldout"),
        ({"exclude_classes": ("Cat",)}, "class excluded"),
        ({"include_classes": ("Cat",)}, "class excluded"),
        ({"exclude_flags": ("is_inside",)}, "flag excluded"),
        ({"min_side_px": 1}, "side below min"),
        ({"max_aspect": 2.0}, "aspect above max"),
        ({"max_iou": 0.9}, "near duplicate"),
    ):
        found = [name for name, _ in report.filter_table(counts, off.model_copy(update=settings))]
        assert set(found) == {"area below min", "area above max", reason}
        assert found == [name for name in (rule.reason.replace("_", " ") for rule in RULES) if name in found]


# -- Table 1 -------------------------------------------------------------------------------------------------------


COCOEE = params(("bench.source", "cocoee"), ("bench.cocoee", "test_bench"))


def _card(extractor: str = "clip", *, network: bool = True, photos: int = 40_670, items: int = 3500) -> dict[str, Any]:
    return {
        "bench": {"items": items},
        "extractors": {"efficientnet_lite2": {}, extractor: {"papers_network": network, "reference_n": photos}},
    }


def test_published_numbers_stand_beside_the_papers_own_metrics() -> None:
    results = {"full": _result("full", clip_fid=3.2, qs=77.0, clip_score=85.0, similarity_efficientnet_lite2=0.5)}
    table = published.table_1(COCOEE, _card(), results)
    assert table is not None and table["columns"] == ["FID", "QS", "CLIP score"] and table["why_not"] == []
    assert table["ours"] == [
        (
            "full",
            "N = 12 of 3500; fewer items make FID larger",
            ["3.20 [2.20, 4.20]", "77.0 [76.0, 78.0]", "85.0 [84.0, 86.0]"],
        )
    ]
    rows = {method: values for method, _, values in table["published"]}
    assert rows["Paint by Example"] == ["3.18", "77.80", "84.97"]
    assert all(source for _, source, _ in table["published"])
    assert published.table_1(params(), _card(), results) is None
    page = report.page_environment().get_template("table_1.html.j2")
    html = page.render(table_1=table, colours={"full": 0})
    assert html.count("published</span>") == len(rows) and "not the paper" not in html
    assert page.render(table_1=None, colours={}) == ""


def test_a_row_of_fewer_items_says_so() -> None:
    table = published.table_1(COCOEE, _card(items=13), {"full": _result("full", clip_fid=3.2)})
    assert table is not None and [fewer for _, fewer, _ in table["ours"]] == [
        "N = 12 of 13; fewer items make FID larger"
    ]
    page = report.page_environment().get_template("table_1.html.j2")
    assert "N = 12 of 13" in page.render(table_1=table, colours={"full": 0})


def test_pictures_of_a_scope_are_of_items_that_have_it() -> None:
    bench = [{"bench_id": str(n), "box_hole_mask": b"", "exemplar": b""} for n in range(40)]
    bench[7] |= {"segmentation_hole_mask": b"", "pair": b""}
    assert [item["bench_id"] for item in report._evenly_of(bench, ("segmentation", "exemplar"))] == ["7"]
    assert report._evenly_of(bench, ("bezier", "exemplar")) == []
    assert [item["bench_id"] for item in report._evenly_of(bench, ("box", "exemplar"))][::11] == ["0", "39"]


@pytest.mark.parametrize(
    ("card", "metrics", "columns", "kept", "reason"),
    [
        (_card(photos=30), {}, ["clip_fid", "QS", "CLIP score"], ["", "77.80", "84.97"], "compares with 30 photos"),
        (_card(items=6), {}, ["clip_fid", "QS", "CLIP score"], ["", "77.80", "84.97"], "is of 6 items"),
        (_card(), {"qs": "qs_rank_clip"}, ["FID", "QS rank, clip", "CLIP score"], ["3.18", "", "84.97"], "a rank"),
        (
            _card(),
            {"clip_score": "clip_score_whole"},
            ["FID", "QS", "clip_score_whole"],
            ["3.18", "77.80", ""],
            "region",
        ),
        (_card(network=False), {}, ["clip_fid", "qs", "clip_score"], None, "not by CLIP ViT-B/32"),
    ],
)
def test_no_published_number_stands_beside_another_metric(
    card: dict[str, Any], metrics: dict[str, str], columns: list[str], kept: list[str] | None, reason: str
) -> None:
    names = [metrics.get(name, name) for name in ("clip_fid", "qs", "clip_score")]
    table = published.table_1(COCOEE, card, {"full": _result("full", **dict.fromkeys(names, 1.0))})
    assert table is not None and table["columns"] == columns
    assert [values for method, _, values in table["published"] if method == "Paint by Example"] == (
        [kept] if kept else []
    )
    assert reason in " ".join(table["why_not"])
    assert all("" in values or kept for _, _, values in table["published"])


def test_other_extractors_names_stay_with_their_columns() -> None:
    names = [f"{metric}_efficientnet_lite2" for metric in ("frechet", "qs_rank", "similarity")]
    card = {"bench": {"items": 3500}, "extractors": {"efficientnet_lite2": {"papers_network": False, "reference_n": 9}}}
    table = published.table_1(COCOEE, card, {"full": _result("full", **dict.fromkeys(names, 1.0))})
    assert table is not None and table["published"] == []
    assert table["columns"] == [
        f"{label}, efficientnet_lite2" for label in ("Frechet distance", "QS rank", "Similarity")
    ]


def test_every_kind_of_baseline_has_its_note_for_the_page() -> None:
    union = get_args(BaselineConfig)[0]
    kinds = {kind for model in get_args(union) for kind in get_args(model.model_fields["kind"].annotation)}
    notes = report.baseline_notes()
    assert notes.keys() == kinds
    for note in notes.values():
        assert note.keys() == {"what", "original", "differs"} and note["what"]
        assert bool(note["original"]) == bool(note["differs"])


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "total"), [(12, 111), (12, 12), (12, 5), (12, 1), (12, 0)])
def test_evenly_spaced_items_repeat_nothing_and_reach_both_ends(count: int, total: int) -> None:
    found = report.evenly(count, total)
    assert len(found) == len(set(found)) == min(count, total)
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, total - 1)


def _triplets(store: Store) -> Manifest:
    """Two slots of two shards, the first shard empty; each reference is another picture."""
    rows = []
    for slot in range(2):
        noise = np.random.default_rng(slot).integers(0, 256, (6, 6, 3)).astype(np.uint8)
        picture = images.encode_jpeg(images.resize(noise, width_px=64, height_px=64), 95)
        masks = dict.fromkeys(("box_hole_mask", "bezier_hole_mask"), pack_mask(np.ones((64, 64), np.uint8)))
        box = dict.fromkeys(("box_x0_px", "box_y0_px", "box_x1_px", "box_y1_px"), 1.0)
        row = {"image_id": "cat", "slot": slot, "box_index": 0, "label_name": "Cat", "source": picture}
        rows.append({**row, "reference": picture, **masks, **box})
    units = [
        store.write_unit(
            "materialize",
            f"b{shard}-test",
            {f"slot-{row['slot']:04d}": pa.Table.from_pylist([row] * shard, schema=TRIPLETS) for row in rows},
            counts={},
        )
        for shard in range(2)
    ]
    return make_manifest("materialize", config={}, version=1, units=units)


def test_augmentation_shows_the_clean_reference_and_the_draws_that_encode_makes_of_it(store: Store) -> None:
    triplets = _triplets(store)
    rows = report.augmentation_rows(store, triplets, seed=7)
    assert [(row["label"], len(row["pictures"])) for row in rows] == [
        ("clean", 1),
        ("draws 1 to 8", 8),
        ("draws 9 to 16", 8),
    ]
    (clean, *draws), alts = zip(*(picture for row in rows for picture in row["pictures"]), strict=True)
    assert alts[0] == "clean reference, cat, Cat" and alts[16] == "augmented reference, draw 16, cat, Cat"
    assert len(set(alts)) == 17
    assert sum(draw != clean for draw in draws) >= 12 and len(set(draws)) >= 8  # an eighth stays clean, as many mirror
    assert report.augmentation_rows(store, triplets, seed=7) == rows
    assert report.augmentation_rows(store, triplets, seed=8)[0] == rows[0]
    assert report.augmentation_rows(store, triplets, seed=8)[1:] != rows[1:]
    reference = images.decode(store.read_table(triplets.units[1].file("slot-0000")).column("reference")[0].as_py())
    assert clean == report.picture_uri(reference)
    for draw, shown in enumerate(draws, start=1):
        rng = row_rng(7, "cat", 0, "reference", draw)  # as pbe.encode
        assert shown == report.picture_uri(augment_reference(reference, augmenter=make_augmenter(), rng=rng))


def test_the_page_reads_only_settings_that_exist() -> None:
    """Also in the branches that no run of the tests takes: a page on unseen photos once asked for evaluate.split."""
    source = (REPOSITORY / "pipelines" / "reporting" / "page.html.j2").read_text(encoding="utf-8")
    read = {
        (section.attr, key.attr)
        for key in Environment().parse(source).find_all(nodes.Getattr)
        if isinstance(section := key.node, nodes.Getattr)
        and isinstance(section.node, nodes.Name)
        and section.node.name == "params"
    }
    sections = {name: field.annotation for name, field in Params.model_fields.items()}
    models = {
        name: kind for name, _ in read if isinstance(kind := sections[name], type) and issubclass(kind, BaseModel)
    }
    assert len(models) > 3
    assert [f"{name}.{key}" for name, key in read if name in models and key not in models[name].model_fields] == []


def test_charts_name_what_they_show_and_draw_what_is_empty() -> None:
    """Well-formed also with names that hold < and &, and the same at every run: the page is hashed by DVC."""
    history = [{"step": float(step), "loss": 1 / step} for step in range(1, 40)]
    areas = np.concatenate([np.random.default_rng(0).random(300) ** 3, [0.0, 1e-9, 1.0]])
    for draw, names in (
        (lambda: loss_svg({"full": history, "other": history[:1]}), {"full", "other"}),
        (lambda: areas_svg(areas, areas[areas > 0.02]), set()),
        (lambda: areas_svg(areas[:0], areas[:0]), set()),
        (lambda: classes_svg([("Cat", 30, 20), ("Bat & <Ball>", 4, 0)]), {"Cat", "Bat & <Ball>", "read", "kept"}),
    ):
        svg = draw()
        assert svg == draw()
        assert names <= set(_texts(svg))
    tops = {text: at for text, at in _texts(classes_svg([("Cat", 30, 20), ("Dog", 4, 0)])).items() if at is not None}
    assert tops["Cat"] < tops["Dog"]  # the most frequent above


def test_names_from_data_are_no_formulas_no_markup_and_no_control_characters() -> None:
    names = [
        r"$\frac{a$",
        "Dog$$",
        "$x^2$",
        "<b>bold</b>",
        "#010203",
        "日本犬",
        "\x1b[2J",
        "\u202egpj",
        "",
        "7",
        "n" * 90,
    ]
    found = _texts(classes_svg([(name, 20 - index, 1) for index, name in enumerate(names)]))
    assert {*names[:6], r"\x1b[2J", r"\u202egpj", "7", "n" * 39 + "…"} <= set(found)
    page = report.page_environment().from_string('<i title="{{ name }}">{{ name }}</i>')
    assert page.render(name='"><b>\u202e') == '<i title="&#34;&gt;&lt;b&gt;\\u202e">&#34;&gt;&lt;b&gt;\\u202e</i>'
    assert page.render(name=Markup("<svg>\n</svg>")) == '<i title="<svg>\n</svg>"><svg>\n</svg></i>'


def _texts(svg: str) -> dict[str, float | None]:
    """What the chart says, and how far down."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {text.text or "": float(text.attrib["y"]) if "y" in text.attrib else None for text in found}


def test_a_dropped_photo_says_why(store: Store) -> None:
    large = ("area_above_max", "relative area 0.91, allowed 0.02..0.8")
    rows = {
        "ingest": [("x.jpg", "image_unreadable", "x.jpg: empty"), ("boxes.csv:2", "box_unparsable", "not a photo")],
        "filter": [("cat#0", *large), ("bat#0", "area_below_min", "-"), ("bat#1", *large), ("bat#2", *large)],
        "materialize": [(key, "image_without_kept_box", "see filter") for key in ("cat", "bat")],
    }
    data = {}
    for stage, found in rows.items():
        names = ("key", "reason", "detail")
        dropped = [{"stage": stage, **dict(zip(names, row, strict=True))} for row in found]
        tables = {"rejects": pa.Table.from_pylist(dropped, schema=REJECTS)}
        unit = store.write_unit(stage, "b0000-test", tables, counts={})
        data[stage] = make_manifest(stage, config={}, version=1, units=[unit])
    assert list(report.dropped_photos(Stage("report", None, params(), store, REPOSITORY), data)) == [
        ("x.jpg", "image unreadable: x.jpg: empty"),
        ("cat", "the filter dropped its only box: relative area 0.91, allowed 0.02..0.8"),
        ("bat", "the filter dropped all 3 boxes: 2 area above max, 1 area below min"),
    ]


# -- summary -------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with metrics of all methods of the tiny profile, in place of the repository."""
    number = {"value": 0.02, "low": 0.01, "high": 0.03, "n": 12, "clusters": 4, "method": "", "extractor": ""}
    scopes = {"box": {"exemplar": dict.fromkeys(summary.headline_metrics("efficientnet_lite2"), number)}}
    names = [*TINY["variants"], *TINY["baselines"]]
    folder = tmp_path / "data" / "evaluate"
    folder.mkdir(parents=True)
    metrics = {name: {"protocol": {}, **scopes} for name in names} | {"card": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(summary, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(summary, "load_params", params)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a folder/mlflow.db")
    return tmp_path


def test_summary_is_short_and_its_command_survives_spaces(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 10
    assert "exemplar gain 0.020 [0.010, 0.030]" in lines[1]
    assert f"Report: {evaluated}/reports/index.html" in lines
    command = shlex.split(lines[-1].removeprefix("MLflow: "))
    assert command[1:] == [
        "-m",
        "mlflow",
        "ui",
        "--host",
        "127.0.0.1",
        "--backend-store-uri",
        f"sqlite:///{evaluated}/a folder/mlflow.db",
    ]


def test_summary_has_a_line_for_each_form_of_caption(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text variant has no exemplars."""
    path = evaluated / "data" / "evaluate" / "metrics.json"
    metrics = json.loads(path.read_text())
    numbers = metrics["untrained"]["box"].pop("exemplar")
    metrics["untrained"]["box"] = {"label": numbers, "label_colour": numbers}
    path.write_text(json.dumps(metrics))
    summary.main()
    said = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  untrained")]
    assert said == ["untrained: label", "untrained: label and colour"]


def test_summary_names_what_is_missing(evaluated: Path) -> None:
    path = evaluated / "data" / "evaluate" / "metrics.json"
    path.write_text(
        json.dumps({name: found for name, found in json.loads(path.read_text()).items() if name != "poisson"})
    )
    with pytest.raises(StageError, match=r"metrics\.json: has no poisson; run `dvc repro evaluate` first"):
        summary.main()
    path.unlink()
    with pytest.raises(StageError, match="run `dvc repro evaluate` first"):
        summary.main()
