"""Training input: from pixels, every step sees what the encode stage would have stored; other triplets are refused.

Real triplets, made by pbe.data of painted photos; the real encode path; rows stored in float32 where numbers are
compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbe.data.slots import TRIPLETS_PER_GROUP, InputError, require_same_rows, slot_files
from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.architecture import Architecture
from pbe.model.backbone import EfficientNetLite
from pbe.model.clip import ClipBackbone
from pbe.model.codec import PatchCodec
from pbe.model.unet import new_network
from pbe.model.vae import KlCodec
from pbe.store import File, Manifest, Store
from pbe.train.checkpoints import Run
from pbe.train.data.batch import Batch
from pbe.train.data.draws import Draws, draw
from pbe.train.data.input import TrainInput, open_input
from pbe.train.data.order import Share
from pbe.train.data.pixels import PixelRows
from pbe.train.data.reader import Group, RowReader
from pbe.train.loss import Diffusion, row_losses
from pbe.train.settings import TrainConfig
from tests.tiny_weights import CLIP_WIDTH, REFERENCE_PX, tiny_clip, tiny_vae
from tests.train.pixels import PHOTOS_OF_SHARD, SEED, SLOTS, Networks, encoded_of, triplets_of
from tests.train.ranks import ARCH, loss_curve, run_ranks, tiny_config, tiny_spec, train

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Triplets in a storage, and the same in float32 arrays."""

    store: Store
    triplets: Manifest
    encoded: Manifest
    networks: Networks


@pytest.fixture(scope="module")
def networks(codec: PatchCodec, backbone: EfficientNetLite) -> Networks:
    return Networks(codec, backbone, "class")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, networks: Networks) -> Place:
    store = Store(str(tmp_path_factory.mktemp("input") / "store"))
    triplets = triplets_of(store)
    return Place(store, triplets, encoded_of(store, triplets, networks), networks)


def config(**changes: object) -> TrainConfig:
    return tiny_config(**{"streams": 4, "batch": 8, "micro_batch": 4, "validation_rows": 5, **changes})


def opened(
    place: Place, cfg: TrainConfig, *, seed: int = SEED, rank: int = 0, world: int = 1, start_step: int = 0
) -> closing[TrainInput[Any]]:
    """The training input, closed at the end of a `with`."""
    share = Share(rank, world, start_step)
    if cfg.input == "pixels":
        networks = place.networks
        rows = PixelRows(
            place.encoded,
            place.triplets,
            codec=networks.codec,
            backbone=networks.backbone,
            tokens=cfg.exemplar.tokens,
            device=CPU,
        )
        return closing(TrainInput(place.store, rows, cfg=cfg, seed=seed, share=share))
    return closing(
        open_input(
            place.store,
            place.encoded,
            None,
            cfg=cfg,
            seed=seed,
            share=share,
            codec=place.networks.codec,
            device=CPU,
        )
    )


def both(place: Place, count: int, *, seed: int = SEED, **changes: object) -> Iterator[tuple[Batch, Batch]]:
    """`count` micro-batches from stored arrays and from pixels."""
    with (
        opened(place, config(input="encoded", **changes), seed=seed) as cached,
        opened(place, config(input="pixels", **changes), seed=seed) as online,
    ):
        for _ in range(count):
            yield cached.next(), online.next()


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if name != "rows"}


def losses_of(place: Place, arch: Architecture, **changes: object) -> np.ndarray:
    """(steps, 2) mean losses of one network on cached and online batches; it learns from the cached ones."""
    torch.manual_seed(1)
    network = new_network(arch)
    cfg = config(**changes)
    scheduler = scheduler_config("squaredcos_cap_v2", cfg.objective)
    size = arch.latent_px
    diffusion = Diffusion(cfg, torch.zeros(1, arch.latent_channels, size, size), alphas_cumprod(scheduler), CPU)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    out = []
    for cached, online in both(place, 6, seed=SEED, **changes):
        losses = [row_losses(network, batch, diffusion).mean() for batch in (cached, online)]
        out.append([float(loss.detach()) for loss in losses])
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
    return np.array(out)


# -- parity ------------------------------------------------------------------------------------------------------------


def test_pixels_give_the_rows_and_draws_of_the_encoded_rows(place: Place) -> None:
    """One pass over both slots: 32 rows, eight micro-batches."""
    seen: set[str] = set()
    for cached, online in both(place, 8):
        assert cached.rows == online.rows
        seen.update(cached.rows)
        for name, value in tensors(cached).items():
            other = tensors(online)[name]
            assert other.dtype == value.dtype and other.shape == value.shape, name
            torch.testing.assert_close(other, value, atol=3e-5, rtol=1e-5, msg=partial("{}: {}".format, name))
        for name in ("noise", "timestep", "drop_condition", "drop_context"):
            assert torch.equal(tensors(cached)[name], tensors(online)[name])
    assert len(seen) == 32


def test_both_wish_for_the_same_pairs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That draw is the last, after the posterior's, which a codec without spread does not need."""
    made: list[Draws] = []

    def recorded(*given: Any, **named: Any) -> Draws:
        made.append(draw(*given, **named))
        return made[-1]

    monkeypatch.setattr("pbe.train.data.input.draw", recorded)
    wishes: dict[str, dict[str, bool]] = {}
    for source in ("encoded", "pixels"):
        made.clear()
        with opened(place, config(input=source, pair_prob=0.5)) as batches:
            for _ in range(8):
                batches.next()
        wishes[source] = {drawn.row: drawn.wants_pair for drawn in made}
    common = wishes["encoded"].keys() & wishes["pixels"].keys()
    assert len(common) >= 32 and all(wishes["encoded"][row] == wishes["pixels"][row] for row in common)
    assert len(set(wishes["pixels"].values())) == 2


def test_another_training_seed_draws_anew_but_for_what_encode_has_drawn(place: Place) -> None:
    """train.seed moves order, noise and holes; references from pixels stay those of the encoded rows."""
    for (cached, online), (before, _) in zip(both(place, 4, seed=SEED + 1), both(place, 4), strict=True):
        assert cached.rows == online.rows != before.rows
        assert not torch.equal(cached.noise, before.noise)
        for name, value in tensors(cached).items():
            torch.testing.assert_close(tensors(online)[name], value, atol=3e-5, rtol=1e-5)


def test_the_number_of_stored_references_moves_the_other_draws_of_both_alike(place: Place, networks: Networks) -> None:
    more = replace(place, encoded=encoded_of(place.store, place.triplets, networks, draws=4))
    ((cached, online),) = both(more, 1)
    ((two, _),) = both(place, 1)
    assert torch.equal(cached.noise, online.noise) and torch.equal(cached.timestep, online.timestep)
    assert cached.rows == two.rows and not torch.equal(cached.timestep, two.timestep)


def test_the_loss_is_that_of_the_cached_rows(place: Place, arch: Architecture) -> None:
    losses = losses_of(place, arch)
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 3e-5
    assert np.ptp(losses[:, 0]) > 1e-2  # else equal losses would mean nothing


def test_with_float16_rows_the_loss_differs_by_rounding_only(
    place: Place, networks: Networks, arch: Architecture
) -> None:
    half = replace(place, encoded=encoded_of(place.store, place.triplets, networks, dtype="float16"))
    losses = losses_of(half, arch)
    assert 1e-7 < np.abs(losses[:, 0] - losses[:, 1]).max() < 3e-3


def test_the_papers_networks_too(tmp_path: Path, one_thread: None) -> None:
    """AutoencoderKL, whose posterior has a width, and CLIP with all of its tokens."""
    store = Store(str(tmp_path / "store"))
    triplets = triplets_of(store, image_px=32, reference_px=REFERENCE_PX)
    networks = Networks(KlCodec(tiny_vae(), digest="x"), ClipBackbone(tiny_clip(), digest="x"), "all")
    encoded = encoded_of(store, triplets, networks, image_px=32)
    place = Place(store, triplets, encoded, networks)
    exemplar = config().exemplar.model_dump() | {"tokens": "all"}
    arch = replace(ARCH, latent_px=4, latent_channels=4, backbone_width=CLIP_WIDTH)
    losses = losses_of(place, arch, exemplar=exemplar)
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 3e-5
    (_, online), *_ = both(place, 1, exemplar=exemplar)
    assert online.exemplar_tokens.shape[1] == networks.backbone.token_count > 1


def test_all_tokens_come_from_pixels_where_only_the_class_token_is_stored(place: Place) -> None:
    exemplar = config().exemplar.model_dump() | {"tokens": "all"}
    with (
        opened(place, config(input="pixels")) as one,
        opened(place, config(input="pixels", exemplar=exemplar)) as every,
    ):
        pooled, tokens = one.next().exemplar_tokens, every.next().exemplar_tokens
        assert tokens.shape == (4, 50, 1280)
        torch.testing.assert_close(tokens[:, :1], pooled, atol=1e-5, rtol=1e-5)
        assert every.validation().exemplar_tokens.shape == (5, 50, 1280)


def test_validation_rows_are_the_same_too(place: Place) -> None:
    with opened(place, config(input="encoded")) as cached, opened(place, config(input="pixels")) as online:
        expected, got = cached.validation(), online.validation()
    assert got.rows == expected.rows and len(got.rows) == 5
    for name, value in tensors(expected).items():
        torch.testing.assert_close(tensors(got)[name], value, atol=3e-5, rtol=1e-5)


# -- references --------------------------------------------------------------------------------------------------------


def _tokens_by_epoch(place: Place, steps: int, **changes: object) -> dict[str, torch.Tensor]:
    """Exemplar tokens by row name, which has the epoch."""
    with opened(place, config(input="pixels", **changes)) as online:
        batches = [online.next() for _ in range(2 * steps)]
    return {row: batch.exemplar_tokens[index] for batch in batches for index, row in enumerate(batch.rows)}


def test_references_are_drawn_afresh_at_each_visit_of_a_slot(place: Place) -> None:
    """Three passes of 32 rows. A few draws leave a picture unchanged, so most must differ, not all."""
    tokens = _tokens_by_epoch(place, 13)
    visits = [
        [tokens[f"photo{number} slot {slot} epoch {slot + SLOTS * visit}"] for visit in range(3)]
        for number in range(6)
        for slot in range(SLOTS)
    ]
    different = [not torch.equal(first, other) for first, *others in visits for other in others]
    assert np.mean(different) > 0.7


def test_without_augmentation_every_visit_has_the_clean_reference(place: Place) -> None:
    tokens = _tokens_by_epoch(place, 9, reference_augmentation=False)
    for number in range(6):
        first, second = (tokens[f"photo{number} slot 0 epoch {epoch}"] for epoch in (0, 2))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)  # other neighbours in the micro-batch


# -- order -------------------------------------------------------------------------------------------------------------


def test_ranks_and_resumes_see_the_same_rows(place: Place) -> None:
    def names(rank: int, world: int, start_step: int) -> list[set[str]]:
        cfg = config(input="pixels", micro_batch=2)
        with opened(place, cfg, rank=rank, world=world, start_step=start_step) as source:
            return [{row for _ in range(4 // world) for row in source.next().rows} for _ in range(3)]

    alone = names(0, 1, 5)
    assert [a | b for a, b in zip(names(0, 2, 5), names(1, 2, 5), strict=True)] == alone
    assert names(0, 1, 6)[:2] == alone[1:]


def test_triplet_files_have_small_row_groups(place: Place) -> None:
    """Otherwise these tests would never read a file of several groups."""
    for file in slot_files(place.triplets)[0]:
        with place.store.open_parquet(file) as parquet:
            assert parquet.num_row_groups == -(-file.rows // TRIPLETS_PER_GROUP)
    assert max(PHOTOS_OF_SHARD) > TRIPLETS_PER_GROUP


def test_a_group_of_triplets_is_read_once_per_visit_without_any_cache(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of groups of eight rows, which take turns; 12 steps are several passes."""
    read: list[tuple[int, int, int]] = []
    seen: set[tuple[str, ...]] = set()

    class Counting(RowReader):
        def __init__(self, store: Store, files: Sequence[Sequence[File]], _: int, **rest: Any) -> None:
            super().__init__(store, files, 0, **rest)

        def _read_group(self, key: tuple[int, int, int]) -> Group:
            read.append(key)
            return super()._read_group(key)

    monkeypatch.setattr("pbe.train.data.input.RowReader", Counting)
    settings = dict(place.encoded.config) | {"rows_per_group": TRIPLETS_PER_GROUP}
    with opened(replace(place, encoded=replace(place.encoded, config=settings)), config(input="pixels")) as online:
        for _ in range(24):
            seen.update(tuple(row.split(" slot ")) for row in online.next().rows)
    group_of_photo = {f"photo{number}": group for number, group in enumerate("aaaaabbbbbbbbcdd")}
    # the prefetch thread is a few batches ahead, so it may have begun one more group in each of the four streams
    assert len(read) <= len({(group_of_photo[photo], visit) for photo, visit in seen}) + 8


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_other_triplets_are_refused(place: Place) -> None:
    require_same_rows(place.encoded, place.triplets)
    for encoded, triplets in (
        (place.encoded, replace(place.triplets, digest="other")),
        (replace(place.encoded, config={**place.encoded.config, "triplets": None}), place.triplets),
        (replace(place.encoded, units=place.encoded.units[1:]), place.triplets),
    ):
        with pytest.raises(InputError, match="these are triplets"):
            require_same_rows(encoded, triplets)
        with (
            pytest.raises(InputError, match="made from triplets"),
            opened(replace(place, encoded=encoded, triplets=triplets), config(input="pixels")),
        ):
            pass


# -- the whole loop ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_run_from_pixels_is_the_run_from_encoded_rows(place: Place, tmp_path: Path) -> None:
    """Four steps are one pass over both slots."""
    arch = replace(ARCH, latent_channels=place.networks.codec.channels)
    curves = {}
    for source, world in (("encoded", 1), ("pixels", 1), ("pixels", 2)):
        cfg = tiny_config(input=source, steps=4, warmup_steps=1, micro_batch=4, workers=world, validate_every=4)
        name = f"{source}-{world}"
        triplets = place.triplets if source == "pixels" else None
        spec = tiny_spec(place.store, place.encoded, cfg, name, seed=SEED, triplets=triplets, arch=arch)
        run_ranks(train, spec, world=world, tmp=tmp_path)
        history = Run(place.store, name).read_json("history.json")
        assert history is not None
        curves[name] = [*loss_curve(place.store, name), history["history"][-1]["validation_loss"]]
    for world in (1, 2):
        np.testing.assert_allclose(curves[f"pixels-{world}"], curves["encoded-1"], rtol=0, atol=3e-5)
    assert np.ptp(curves["encoded-1"]) > 1e-2
