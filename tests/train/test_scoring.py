"""Scores while training: the same for any number of ranks and after a kill, and without effect on what is trained."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from pbe.data.images import decode
from pbe.data.schema import TRIPLETS
from pbe.data.slots import TRIPLETS_PER_GROUP, InputError, slot_files
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.encode import encode_masked, encode_references, encode_source
from pbe.evaluate.features.weights import store_extractor
from pbe.evaluate.judge import open_judge
from pbe.evaluate.settings import ClipExtractorConfig
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone
from pbe.model.codec import Codec, PatchCodec
from pbe.store import Manifest, Store, make_manifest
from pbe.train.checkpoints import Run
from pbe.train.data.encoded import EncodedRows
from pbe.train.data.input import TrainInput
from pbe.train.data.order import Share
from pbe.train.data.pixels import PixelRows
from pbe.train.data.scored import foreign_rows
from pbe.train.fill import codec_on, quick_sampling
from pbe.train.settings import TrainConfig
from tests.tiny_weights import CLIP_WIDTH, REFERENCE_PX, tiny_clip, write_clip_extractor
from tests.train.pixels import SEED, Networks, encoded_of, triplets_of
from tests.train.ranks import ARCH, KillAt, RankDiedError, loss_curve, run_ranks, tiny_config, tiny_spec, train

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("one_thread")]

SCORES = ("score/exemplar_gain_clip", "score/kid_clip")


@dataclass(frozen=True)
class Place:
    store: Store
    triplets: Manifest
    encoded: Manifest
    networks: Networks
    extractor: dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, codec: PatchCodec) -> Place:
    folder = tmp_path_factory.mktemp("scoring")
    store = Store(str(folder / "store"))
    triplets = triplets_of(store, reference_px=REFERENCE_PX)
    networks = Networks(codec, ClipBackbone(tiny_clip(), digest="tiny"), "class")
    weights = str(write_clip_extractor(folder / "clip"))
    extractor = store_extractor(store, ClipExtractorConfig(kind="clip", weights=weights, mixture=None))
    return Place(store, triplets, encoded_of(store, triplets, networks), networks, dict(extractor))


def config(**changes: Any) -> TrainConfig:
    score = {"score_every": 3, "score_rows": 5, "score_extractor": {"kind": "clip", "weights": "-"}}
    return tiny_config(**{"micro_batch": 2, "steps": 4, **score, **changes})


Runs = Callable[..., list[dict[str, float]]]


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Runs:
    """Train under a name and return the points of the loss curve."""

    def _run(name: str, *, world: int = 1, killed_at: int | None = None, **changes: Any) -> list[dict[str, float]]:
        card = ModelCard(16, REFERENCE_PX, 2, "class", scheduler_config("squaredcos_cap_v2", "x0"), {})
        codec, cfg = place.networks.codec, config(workers=world, **changes)
        arch = replace(ARCH, latent_px=16 // codec.patch_px, latent_channels=codec.channels, backbone_width=CLIP_WIDTH)
        judge = partial(open_judge, place.extractor)
        spec = tiny_spec(
            place.store, place.encoded, cfg, name, triplets=place.triplets, arch=arch, card=card, open_judge=judge
        )
        if killed_at is not None:
            with pytest.raises(RankDiedError):
                run_ranks(train, replace(spec, on_progress=KillAt(killed_at)), world=world, tmp=tmp_path)
        run_ranks(train, spec, world=world, tmp=tmp_path)
        history = Run(place.store, name).read_json("history.json")
        assert history is not None
        return history["history"]

    return _run


def scores(points: list[dict[str, float]]) -> np.ndarray:
    """(points with scores, 2)."""
    return np.array([[point[name] for name in SCORES] for point in points if SCORES[0] in point])


def test_scores_are_the_same_on_two_ranks(run: Runs) -> None:
    """Three chunks of rows, so that one of the two ranks fills a spare one."""
    points = run("straight")
    assert [point["step"] for point in points if SCORES[0] in point] == [3, 4]
    assert all(point["score/rows"] == 5 and point["score/seconds"] > 0 for point in points if SCORES[0] in point)
    expected = scores(points)
    assert np.isfinite(expected).all() and (expected[0] != expected[1]).all()
    np.testing.assert_allclose(scores(run("two", world=2)), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_they_are_the_same_under_zero_3_and_logged_once_through_a_kill(run: Runs) -> None:
    expected = scores(run("stage-2"))
    np.testing.assert_allclose(scores(run("stage-3", world=2, zero_stage=3)), expected, rtol=0, atol=1e-4)
    resumed = run("resumed", killed_at=3, checkpoint_every=2)
    assert [point["step"] for point in resumed] == [1, 2, 3, 4]
    np.testing.assert_allclose(scores(resumed), expected, rtol=0, atol=1e-4)


def test_training_does_not_depend_on_them(run: Runs, place: Place) -> None:
    """But for last digits. A score is a point of the curve, so that a step without a log point has one too."""
    rare = {"log_every": 4, "validate_every": 4}
    scored, alone = run("scored", **rare), run("alone", score_every=0, **rare)
    assert [point["step"] for point in scored] == [3, 4] and [point["step"] for point in alone] == [4]
    assert not any(name.startswith("score/") for point in alone for name in point)
    assert abs(loss_curve(place.store, "scored")[-1] - loss_curve(place.store, "alone")[-1]) < 1e-5
    folders = [Path(place.store.path(f"runs/{name}/export/unet")) for name in ("scored", "alone")]
    weights, others = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert max(np.abs(weights[name] - others[name]).max() for name in weights) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", pytest.param("bf16_autocast", marks=pytest.mark.slow)])
def test_in_bfloat16_they_are_near_those_of_float32(run: Runs, precision: str) -> None:
    [other], [exact] = (scores(run(f"in-{name}", precision=name, steps=2)) for name in (precision, "fp32"))
    np.testing.assert_allclose(other, exact, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_a_model_that_learns_scores_better(run: Runs) -> None:
    long = {"steps": 400, "score_every": 400, "log_every": 50, "score_rows": 32, "micro_batch": 8, "lr": 5e-3}
    [untrained] = scores(run("begun", **long | {"steps": 1}))
    [trained] = scores(run("learnt", **long))
    assert trained[0] > untrained[0] and trained[1] < 0.5 * untrained[1]


def with_pairs(store: Store, triplets: Manifest) -> Manifest:
    """Every second row of the first part has another row's reference as its pair; other parts have none."""
    first, *others = triplets.units
    tables = {}
    for file in (file for file in first.files if file.dataset.startswith("slot-")):
        table = store.read_table(file)
        references = table.column("reference").to_pylist()
        pairs = [None if number % 2 else references[number - 1] for number in range(len(references))]
        field = TRIPLETS.field("pair_reference")
        place = table.schema.get_field_index("reference") + 1
        tables[file.dataset] = table.add_column(place, field, pa.array(pairs, field.type))
    unit = store.write_unit(
        "materialize", "s0000-pairs", tables, counts=first.counts, rows_per_group=TRIPLETS_PER_GROUP
    )
    return make_manifest("materialize", config={}, version=1, units=[unit, *others])


@pytest.mark.parametrize(("source", "pair_prob"), [("encoded", 0.5), ("encoded", 0.0), ("pixels", 0.5)])
def test_pictures_belong_to_the_rows_that_are_filled(place: Place, source: str, pair_prob: float) -> None:
    """20 rows, four of them of the second slot; encoded here, each picture must give what the batch has."""
    networks, store, device = place.networks, place.store, torch.device("cpu")
    triplets = with_pairs(store, place.triplets)
    encoded = encoded_of(store, triplets, networks)
    cfg = config(score_rows=20, input=source, pair_prob=pair_prob)
    rows: Any = EncodedRows(encoded, tokens="class", device=device)
    if source == "pixels":
        rows = PixelRows(
            encoded, triplets, codec=networks.codec, backbone=networks.backbone, tokens="class", device=device
        )
    with closing(TrainInput(store, rows, cfg=cfg, seed=SEED, share=Share(0, 1, 0))) as opened:
        batch, pictures = opened.scored(triplets)
    assert len(pictures) == len(batch.rows) == 20
    assert [name.split()[0] for name in batch.rows] == [row.image_id for row in pictures]
    assert [name.split()[2] for name in batch.rows] == ["0"] * 16 + ["1"] * 4
    photos, holes, references = (
        np.stack([getattr(row, name) for row in pictures]) for name in ("photo", "hole_mask", "reference")
    )
    masked, keep_mask = encode_masked(networks.codec, photos, holes)
    tokens = encode_references(networks.backbone, references)
    for found, expected in (
        (batch.x0, encode_source(networks.codec, photos).mean),
        (batch.masked_latent, masked.mean),
        (batch.keep_mask_latent, keep_mask),
        (batch.exemplar_tokens, tokens),
    ):
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)
    own = [row["reference"] for file in slot_files(triplets)[0] for row in store.read_table(file).to_pylist()]
    differ = [not np.array_equal(decode(data), row.reference) for data, row in zip(own, pictures, strict=False)]
    assert sum(differ) == (3 if pair_prob else 0)
    assert not (batch.drop_condition.any() or batch.drop_context.any())


def test_a_foreign_reference_is_of_another_photo() -> None:
    assert foreign_rows(["a", "a", "b", "a"]) == [2, 2, 3, 2]
    with pytest.raises(InputError, match=r"train\.score_every: scores need rows of two photos"):
        foreign_rows(["a", "a"])


def test_without_condition_dropout_nothing_is_guided() -> None:
    assert quick_sampling(config(condition_dropout_prob=0.0)).guidance_scale == 1
    assert quick_sampling(config(condition_dropout_prob=0.1)).guidance_scale == 3


class Moved:
    """A codec that knows only where it was sent."""

    def __init__(self) -> None:
        self.to_devices: list[str] = []

    def to(self, device: torch.device) -> "Moved":
        self.to_devices.append(device.type)
        return self


@pytest.mark.parametrize(("source", "devices"), [("encoded", ["cuda", "cpu"]), ("pixels", ["cuda"])])
def test_the_codec_leaves_the_gpu_unless_every_step_runs_it(source: str, devices: list[str]) -> None:
    codec = Moved()
    with codec_on(torch.device("cuda"), cast(Codec, codec), tiny_config(input=source)):
        assert codec.to_devices == ["cuda"]
    assert codec.to_devices == devices
