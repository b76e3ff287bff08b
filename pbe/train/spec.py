"""What one training is: the driver writes it, every worker reads it. No torch here: the driver does not need it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pbe.model.architecture import Architecture
from pbe.model.card import ModelCard
from pbe.store import Manifest, Store
from pbe.train.settings import TrainConfig

if TYPE_CHECKING:
    import torch

    from pbe.train.scoring import Judge


@dataclass(frozen=True)
class TrainSpec:
    """Everything a worker needs; pickled and sent to every rank."""

    cfg: TrainConfig
    seed: int
    store_uri: str
    encoded: Manifest
    triplets: Manifest | None  # for train.input: pixels, train.condition: text, and train.score_every
    arch: Architecture
    initial: tuple[str, str | None] | None  # storage paths of a UNet and an image encoder; None: random weights
    card: ModelCard
    run_name: str
    origin: tuple[str, int] | None  # run and step of the checkpoint that `train.resume_from` names
    tracking_uri: str | None  # None: no logging
    mlflow_run_id: str
    on_progress: Callable[[Mapping[str, float]], None] | None = None  # rank 0 calls it with each point of the curve
    text: str | None = None  # storage path of the text encoder, for train.condition: text
    open_judge: "Callable[[Store, torch.device], Judge] | None" = None  # for train.score_every
    adapter: str | None = None  # storage path of the adapter to go on with, whose base is `initial`
    base_name: str = ""  # of the model that a new adapter belongs to
