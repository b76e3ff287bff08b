"""Training on captions: each row has its own, whatever the batch and the ranks; the export edits by captions."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbe.data.captions import caption
from pbe.data.images import decode
from pbe.data.schema import CAPTION_FORMS
from pbe.data.slots import InputError, slot_files
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.edit import Editor
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone
from pbe.model.codec import PatchCodec
from pbe.model.text import load_text_encoder
from pbe.model.weight_store import store_text_encoder
from pbe.store import Manifest, Store
from pbe.train.data.batch import Batch
from pbe.train.data.input import TrainInput, open_input
from pbe.train.data.order import Share
from pbe.train.settings import TrainConfig
from tests.tiny_weights import CLIP_WIDTH, CONTEXT_WIDTH, REFERENCE_PX, tiny_clip, tiny_text_encoder
from tests.train.pixels import SEED, Networks, encoded_of, triplets_of
from tests.train.ranks import ARCH, KillAt, RankDiedError, loss_curve, run_ranks, tiny_config, tiny_spec, train

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Place:
    store: Store
    triplets: Manifest
    encoded: Manifest
    codec: PatchCodec
    text: str  # storage path of the text encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, codec: PatchCodec) -> Place:
    store = Store(str(tmp_path_factory.mktemp("captioned") / "store"))
    triplets = triplets_of(store, reference_px=REFERENCE_PX)
    networks = Networks(codec, ClipBackbone(tiny_clip(), digest="tiny"), "class")
    encoded = encoded_of(store, triplets, networks)
    return Place(store, triplets, encoded, codec, store_text_encoder(store, tiny_text_encoder()))


def config(**changes: Any) -> TrainConfig:
    unet = ARCH.unet.model_dump() | {"context_width": CONTEXT_WIDTH, "class_embedding": False}
    return tiny_config(
        **{"condition": "text", "micro_batch": 4, "validation_rows": 5, "unet": unet, "steps": 6, **changes}
    )


def opened(place: Place, cfg: TrainConfig, *, share: Share, seed: int = SEED) -> closing[TrainInput[Any]]:
    return closing(
        open_input(
            place.store,
            place.encoded,
            place.triplets,
            cfg=cfg,
            seed=seed,
            share=share,
            codec=place.codec,
            text=tiny_text_encoder(),
            device=torch.device("cpu"),
        )
    )


def batches(
    place: Place, count: int, *, rank: int = 0, world: int = 1, seed: int = SEED, **changes: Any
) -> list[Batch]:
    with opened(place, config(workers=world, **changes), share=Share(rank, world, 0), seed=seed) as rows:
        return [rows.next() for _ in range(count)]


def tokens_by_row(found: list[Batch]) -> dict[str, np.ndarray]:
    """By photo and slot."""
    return {
        name.rpartition(" epoch ")[0]: tokens.numpy()
        for batch in found
        for name, tokens in zip(batch.rows, batch.exemplar_tokens, strict=True)
    }


def test_a_rows_caption_is_that_of_its_own_triplet(place: Place) -> None:
    """Row groups of encoded rows and triplets differ in size, so that numbers of rows must be translated."""
    encoder, found = tiny_text_encoder(), tokens_by_row(batches(place, 16))
    rows = [
        row
        for files in slot_files(place.triplets)
        for file in files
        for row in place.store.read_table(file).to_pylist()
    ]
    forms = []
    for row in rows:
        said = [caption(row["label_name"], form, decode(row["reference"])) for form in CAPTION_FORMS]
        near = [
            float(np.abs(found[f"{row['image_id']} slot {row['slot']}"] - tokens.numpy()).max())
            for tokens in encoder(said)
        ]
        assert min(near) < 1e-6 < max(near), row["image_id"]
        forms.append(int(np.argmin(near)))
    assert len(found) == len(rows) and 0.2 < np.mean(forms) < 0.8  # both forms are drawn
    only = tokens_by_row(batches(place, 16, text={"captions": ["label"]}))
    assert len({tokens.tobytes() for tokens in only.values()}) == 1  # all are cats
    assert len({tokens.tobytes() for tokens in found.values()}) > 3  # of several colours


def test_a_row_learns_its_written_caption_and_its_label_where_it_has_none(place: Place, tmp_path: Path) -> None:
    """The second part has no captions, hence no such column."""
    written = {0: "a tabby on a wall", 2: "two cats"}
    store = Store(str(tmp_path))
    triplets = triplets_of(store, photos_of_shard=(4, 4), reference_px=REFERENCE_PX, captions=written)
    assert ["caption" in store.read_table(file).schema.names for file in slot_files(triplets)[0]] == [True, False]
    encoded = encoded_of(store, triplets, Networks(place.codec, ClipBackbone(tiny_clip(), digest="tiny"), "class"))
    mine = replace(place, store=store, triplets=triplets, encoded=encoded)
    found, encoder = tokens_by_row(batches(mine, 8, text={"captions": ["caption"]})), tiny_text_encoder()
    assert {name.split()[0] for name in found} == {f"photo{number}" for number in range(8)}
    for name, tokens in found.items():
        said = written.get(int(name.split()[0].removeprefix("photo")), "a photo of a cat")
        np.testing.assert_allclose(tokens, encoder([said])[0], atol=1e-6, err_msg=name)


def test_captions_do_not_depend_on_ranks_epochs_or_the_batch_and_all_other_draws_stay(place: Place) -> None:
    alone = tokens_by_row(batches(place, 8))
    for rank in (0, 1):
        for name, tokens in tokens_by_row(batches(place, 24, rank=rank, world=2, micro_batch=2)).items():
            if name in alone:
                np.testing.assert_array_equal(tokens, alone[name])
    exemplars = batches(place, 3, condition="exemplar", unet=config().unet.model_dump())
    for text, exemplar in zip(batches(place, 3), exemplars, strict=True):
        for field in ("x0", "masked_latent", "keep_mask_latent", "noise", "timestep", "drop_condition"):
            assert torch.equal(getattr(text, field), getattr(exemplar, field)), field
    other = tokens_by_row(batches(place, 8, seed=SEED + 1))
    assert any((other[name] != alone[name]).any() for name in other.keys() & alone.keys())


def test_triplets_of_other_rows_are_refused(place: Place, tmp_path: Path) -> None:
    other = triplets_of(Store(str(tmp_path)), photos_of_shard=(3, 3), reference_px=REFERENCE_PX)
    foreign = replace(place, triplets=other)
    with pytest.raises(InputError, match="the encoded rows were made from triplets"):
        batches(foreign, 1)


Runs = Callable[..., list[float]]


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Runs:
    def _run(name: str, *, world: int = 1, killed_at: int | None = None) -> list[float]:
        card = ModelCard(16, REFERENCE_PX, 2, "class", scheduler_config("squaredcos_cap_v2", "x0"), {}, "text")
        latent_px = 16 // place.codec.patch_px
        cfg = config(workers=world, checkpoint_every=3)
        arch = replace(
            ARCH,
            unet=cfg.unet,
            latent_px=latent_px,
            latent_channels=place.codec.channels,
            backbone_width=CLIP_WIDTH,
            caption_tokens=tiny_text_encoder().token_count,
        )
        spec = tiny_spec(
            place.store, place.encoded, cfg, name, triplets=place.triplets, arch=arch, card=card, text=place.text
        )
        if killed_at is not None:
            with pytest.raises(RankDiedError):
                run_ranks(train, replace(spec, on_progress=KillAt(killed_at)), world=world, tmp=tmp_path)
        run_ranks(train, spec, world=world, tmp=tmp_path)
        return loss_curve(place.store, name)

    return _run


def test_a_text_model_trains_alike_on_one_rank_or_two_or_resumed_and_its_export_edits_by_captions(
    place: Place, run: Runs
) -> None:
    straight = run("straight")
    assert len(straight) == 6 + 1 and np.isfinite(straight).all()
    np.testing.assert_allclose(run("two", world=2), straight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run("resumed", killed_at=5), straight, rtol=0, atol=1e-5)
    folder = Path(place.store.path("runs/straight/export"))
    editor = Editor.load(folder, device="cpu")
    assert editor.card.condition == "text"
    assert torch.equal(load_text_encoder(folder)(["a cat"]), tiny_text_encoder()(["a cat"]))
    photo = np.full((20, 20, 3), 90, np.uint8)
    hole_mask = np.zeros((20, 20), np.uint8)
    hole_mask[5:12, 5:12] = 1
    [edit] = editor.edit(photo, hole_mask, "a photo of a red cat", seed=1)
    assert (edit[hole_mask == 0] == 90).all() and (edit[hole_mask > 0] != 90).any()
