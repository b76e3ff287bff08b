"""The study stage: whose edits its page shows, which it refuses, and what it leaves. The browser: tests/study."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe.config import Params
from pbe.data import images
from pbe.data.masks import pack_mask
from pbe.data.rng import row_rng
from pbe.data.schema import BENCH, EDITS, NO_SEED
from pbe.errors import ParamsError
from pbe.store import Store, make_manifest, save_manifest
from pipelines import study
from pipelines.runtime.stage import Stage, StageError
from tests.profiles import profile_mapping

SIDE_PX = 40
ITEMS = [f"item{index}" for index in range(8)]
SEEDS = (7, 42)


def params(**changes: Any) -> Params:
    """Of profile tiny, with keys of `study` and whole other sections changed."""
    raw = profile_mapping("tiny")
    raw["edit"] |= {"seeds": list(SEEDS), "holes": ["box", "bezier"]}
    raw["study"] |= {"items": 4, "raters": 6, "repeats": 1, "methods": None, **changes.pop("study", {})}
    return Params.model_validate(raw | changes)


def colour_of(*key: str | int) -> np.ndarray:
    """One flat colour for each picture, which JPEG keeps."""
    return row_rng(0, *key).integers(0, 256, 3, np.uint8)


def png(*key: str | int) -> bytes:
    return images.encode_png(np.broadcast_to(colour_of(*key), (SIDE_PX, SIDE_PX, 3)).copy())


class Bench:
    """A storage with a bench of flat pictures, to which methods' edits are added."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(str(root / "store"))
        hole_mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        hole_mask[10:30, 10:30] = 1
        rows = [
            {
                **dict.fromkeys(BENCH.names),
                "bench_id": name,
                "image_id": name,
                "label_name": "Cat",
                "source": png(name, "source"),
                "box_hole_mask": pack_mask(hole_mask),
                "bezier_hole_mask": pack_mask(1 - hole_mask),
                "exemplar": png(name, "exemplar"),
                "exemplar_image_id": "other",
            }
            for name in ITEMS
        ]
        record = self.store.write_unit("bench", "b", {"bench": pa.Table.from_pylist(rows, schema=BENCH)}, counts={})
        self.sha256 = record.file("bench").sha256
        save_manifest(root / "data/bench/manifest.json", make_manifest("bench", config={}, version=1, units=[record]))

    def add(
        self, method: str, *, seeds: Sequence[int] = SEEDS, without: Sequence[str] = (), references: Sequence[str] = ()
    ) -> None:
        """The method's edits of both holes in two parts, each of a colour of its own."""
        keys = [
            (name, hole, reference, seed)
            for name in ITEMS
            if name not in without
            for hole in ("bezier", "box")
            for reference in references or ("own", "exemplar")
            for seed in sorted(seeds, reverse=True)
        ]
        units = []
        for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :])):
            columns = ("bench_id", "hole_kind", "reference_kind", "seed")
            rows = [{**dict(zip(columns, key, strict=True)), "edit": png(method, *key)} for key in part]
            table = pa.Table.from_pylist(rows, schema=EDITS)
            units.append(self.store.write_unit("edit", f"{method}-{number}", {"edits": table}, counts={}))
        manifest = make_manifest("edit", config={"bench": self.sha256, "method": method}, version=1, units=units)
        save_manifest(self.root / "data" / "edit" / method / "manifest.json", manifest)

    def run(self, found: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """The plan, and what the page knows."""
        study.main(Stage("study", None, found, self.store, self.root))
        plan = json.loads((self.root / "data" / "study" / "plan.json").read_text())
        html = (self.root / "reports" / "study.html").read_text()
        return plan, json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)[0])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def picture(uri: str) -> np.ndarray:
    return images.decode(base64.b64decode(uri.partition(",")[2]))


def shows(uri: str, *key: str | int) -> bool:
    return bool(np.abs(picture(uri).astype(int) - colour_of(*key)).max() <= 3)


def test_the_page_shows_edits_of_the_first_seed_hole_and_the_exemplar(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.add("full")
    bench.add("untrained")
    bench.add("copy_paste", seeds=[NO_SEED])
    bench.add("poisson", seeds=[NO_SEED], without=["item2", "item5"])
    plan, page = bench.run(params())
    assert sorted(plan["methods"].values()) == ["copy_paste", "full", "poisson", "untrained"]
    asked = {entry["item"] for entry in plan["items"]}
    assert len(asked) == 6 and not asked & {"item2", "item5"}
    for name in asked:
        shown = page["pictures"][name]
        for blind, method in plan["methods"].items():
            seed = SEEDS[0] if method in ("full", "untrained") else NO_SEED
            assert shows(shown[blind], method, name, "box", "exemplar", seed), method
        assert shows(shown["exemplar"], name, "exemplar")
        photo = picture(shown["photo"])
        assert np.abs(photo[20, 20].astype(int) - 128).max() <= 3  # the hole
        assert np.abs(photo[2, 2].astype(int) - colour_of(name, "source")).max() <= 3
    attention = {one["item"] for rater in plan["raters"] for one in rater["screens"] if one["role"] == "attention"}
    assert {name for name, shown in page["pictures"].items() if "absurd" in shown} == attention and len(attention) == 1
    assert (page["digest"], page["raters"]) == (plan["digest"], plan["raters"])
    assert not page.keys() & {"methods", "edits", "bench"}
    said = capsys.readouterr().out
    head = "study: 6 raters, 4 items, 13 screens each, methods full, untrained, copy_paste, poisson; plan "
    assert said.startswith(f"{head}{plan['digest']}\n")


def test_large_pictures_are_scaled_down(bench: Bench) -> None:
    bench.add("full")
    bench.add("untrained")
    _, page = bench.run(params(study={"picture_px": 32}, baselines={}))
    assert {picture(uri).shape for shown in page["pictures"].values() for uri in shown.values()} == {(32, 32, 3)}


def test_a_variant_of_words_is_shown_with_its_first_caption(bench: Bench) -> None:
    bench.add("full")
    bench.add("text", references=["label_colour", "label"])
    words = {"train": {"condition": "text", "unet": {"class_embedding": False}}}
    plan, page = bench.run(params(variants={"full": {}, "text": words}, baselines={}))
    blind = {method: name for name, method in plan["methods"].items()}["text"]
    for name, shown in page["pictures"].items():
        assert shows(shown[blind], "text", name, "box", "label", SEEDS[0])


@pytest.mark.parametrize(
    ("variants", "baselines", "expected"),
    [
        (
            ["full", "b", "c"],
            {"hole_kept": "hole_kept", "p": "poisson", "q": "copy_paste"},
            ["full", "b", "c", "p", "q"],
        ),
        (["full", "b", "c", "d", "e", "f"], {"p": "poisson"}, ["full", "b", "c", "d", "e"]),
    ],
)
def test_methods_are_the_first_five_without_open_holes(
    variants: Sequence[str], baselines: Mapping[str, str], expected: Sequence[str]
) -> None:
    kinds = {name: {"kind": kind} for name, kind in baselines.items()}
    found = params(variants={name: {} for name in variants}, baselines=kinds)
    assert list(study.methods(found)) == expected
    asked = params(variants={name: {} for name in variants}, baselines=kinds, study={"methods": ["p", "full"]})
    assert study.methods(asked) == ("p", "full")


@pytest.mark.parametrize(("methods", "told"), [(["full"], "Name a second method"), (["full", "untrained"], "2 items")])
def test_nothing_to_rank_is_said_on_the_terminal_and_the_page_and_fails_no_repro(
    bench: Bench, capsys: pytest.CaptureFixture[str], methods: Sequence[str], told: str
) -> None:
    for method in methods:
        bench.add(method, without=ITEMS[2:])
    plan, page = bench.run(params(variants={name: {} for name in methods}, baselines={}))
    assert plan["raters"] == [] and told in page["without"]
    assert f"study: {page['without']}" in capsys.readouterr().out


def test_a_page_too_large_to_send_is_refused_and_the_earlier_one_stays(bench: Bench) -> None:
    bench.add("full")
    bench.add("untrained")
    plan, _ = bench.run(params(baselines={}))
    with pytest.raises(
        StageError, match=r"study\.max_page_mb = 0\.01; lower study\.picture_px = 384 or study\.items = 5"
    ):
        bench.run(params(study={"max_page_mb": 0.01, "items": 5}, baselines={}))
    assert json.loads((bench.root / "data/study/plan.json").read_text()) == plan
    assert plan["digest"] in (bench.root / "reports/study.html").read_text()


def test_edits_that_are_missing_or_of_another_bench_are_named_with_the_command(bench: Bench) -> None:
    bench.add("full")
    with pytest.raises(
        StageError, match=r"edit/untrained/manifest\.json: not there; run `dvc repro edit@untrained` first"
    ):
        bench.run(params())
    bench.add("untrained")
    bench.sha256 = "0" * 64
    bench.add("copy_paste")
    with pytest.raises(
        StageError, match=r"copy_paste/manifest\.json: edits of another bench; run `dvc repro baseline@copy"
    ):
        bench.run(params())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"methods": ["full", "fulll"]},
            "study.methods: fulll is neither a variant nor a baseline; choose from: full,",
        ),
        ({"methods": ["full", "full"]}, "methods: ['full', 'full'] contains duplicates"),
        ({"methods": ["full"]}, "at least 2"),
        ({"items_per_rater": 5}, "items_per_rater: 5 must be at most items, 4"),
        ({"repeats": 4}, "repeats: 4 must be less than the 4 items that a rater sees"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(changes: Mapping[str, Any], told: str) -> None:
    with pytest.raises((ParamsError, ValueError)) as caught:
        params(study=changes)
    assert told in str(caught.value)
