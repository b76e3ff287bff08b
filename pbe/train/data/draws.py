"""All random choices for one row in one epoch: a pure function of (seed, image_id, slot, epoch).

So a step's loss does not depend on the number of workers, except for the order of float sums.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from pbe.data.rng import row_rng
from pbe.data.schema import HoleKind
from pbe.diffusion.scheduler_config import TRAIN_TIMESTEPS
from pbe.train.settings import HoleProbs, TrainConfig


@dataclass(frozen=True)
class Draws:
    """The random choices for one row. C latent channels, h x w latent pixels."""

    row: str  # which row, used in messages
    epoch: int
    hole_kind: HoleKind
    augment_reference: bool
    stored_reference: int  # index among the stored references; 0 is the clean one
    drop_condition: bool
    drop_context: bool
    timestep: int
    noise: np.ndarray  # (C, h, w) float32, like the two below
    source_normal: np.ndarray | None  # samples the source's posterior; None: that has no spread
    masked_normal: np.ndarray | None
    wants_pair: bool  # whether a row with a pair sees it as its reference


@dataclass(frozen=True)
class RowForm:
    """What of a row its draws depend on; the row's source knows it."""

    hole_kinds: Collection[HoleKind]  # those that the row has
    latent_shape: tuple[int, ...]  # (C, h, w)
    stored_references: int  # how many the encode stage drew, including the clean one
    posterior_has_spread: bool  # False leaves out two thirds of the work: the codec's standard deviation is 0


# `draw`, `validation_draw` or `score_draw` bound to one row
Draw = Callable[[RowForm], Draws]


def draw(image_id: str, slot: int, form: RowForm, *, epoch: int, cfg: TrainConfig, seed: int) -> Draws:
    """The random choices for one training row in one epoch.

    Everything is drawn every time, in one order, so that ablations share all other draws.
    """
    rng = row_rng(seed, image_id, slot, "train", epoch)
    hole_kind = pick_hole(rng.random(), form.hole_kinds, cfg.hole_probs)
    augmented = int(rng.integers(1, form.stored_references)) if form.stored_references > 1 else 0
    return Draws(
        row=f"{image_id} slot {slot} epoch {epoch}",
        epoch=epoch,
        hole_kind=hole_kind,
        augment_reference=cfg.reference_augmentation,
        stored_reference=augmented if cfg.reference_augmentation else 0,
        drop_condition=bool(rng.random() < cfg.condition_dropout_prob),
        drop_context=bool(rng.random() < cfg.context_dropout_prob),
        timestep=int(rng.integers(0, TRAIN_TIMESTEPS)),
        noise=rng.standard_normal(form.latent_shape, dtype=np.float32),
        source_normal=rng.standard_normal(form.latent_shape, dtype=np.float32) if form.posterior_has_spread else None,
        masked_normal=rng.standard_normal(form.latent_shape, dtype=np.float32) if form.posterior_has_spread else None,
        wants_pair=bool(rng.random() < cfg.pair_prob),  # last, so that it changes no other draw
    )


def pick_hole(u: float, hole_kinds: Collection[HoleKind], probs: HoleProbs) -> HoleKind:
    """The kind of hole for u in [0, 1), among those that the row has."""
    shares: list[tuple[HoleKind, float]] = [
        ("bezier", probs.bezier), ("segmentation", probs.segmentation), ("box", probs.box)
    ]  # fmt: skip
    left = [(kind, share) for kind, share in shares if kind in hole_kinds]
    u *= sum(share for _, share in left)
    for kind, share in left:
        if u < share:
            return kind
        u -= share
    return left[-1][0]


def validation_draw(
    image_id: str, slot: int, form: RowForm, *, number: int, count: int, cfg: TrainConfig, seed: int
) -> Draws:
    """Choices for validation row `number` of `count`: timesteps are spread evenly over the rows, box and Bezier holes
    alternate whatever trains, the reference is the clean one and nothing is dropped."""
    drawn = draw(image_id, slot, form, epoch=0, cfg=cfg, seed=seed)
    return replace(
        drawn,
        hole_kind="bezier" if number % 2 else "box",
        augment_reference=False,
        stored_reference=0,
        drop_condition=False,
        drop_context=False,
        timestep=int((number + 0.5) * TRAIN_TIMESTEPS / count),
    )


def score_draw(image_id: str, slot: int, form: RowForm, *, cfg: TrainConfig, seed: int) -> Draws:
    """Choices for a row that is scored: the box hole, the clean reference, and nothing is dropped. A row with a pair
    sees it if rows of this training may."""
    drawn = validation_draw(image_id, slot, form, number=0, count=1, cfg=cfg, seed=seed)
    return replace(drawn, wants_pair=cfg.pair_prob > 0)
