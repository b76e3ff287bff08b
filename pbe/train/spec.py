"""What one training is: the driver writes it, every worker reads it. No torch here: the driver does not need it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pbe.model.architecture import Architecture
from pbe.model.card import ModelCard
from pbe.store import Manifest
from pbe.train.settings import TrainConfig


@dataclass(frozen=True)
class TrainSpec:
    """Everything a worker needs; pickled and sent to every rank."""

    cfg: TrainConfig
    seed: int
    store_uri: str
    encoded: Manifest
    triplets: Manifest | None  # needed for train.input: pixels
    arch: Architecture
    initial: tuple[str, str | None] | None  # storage paths of a UNet and an image encoder; None: random weights
    card: ModelCard
    run_name: str
    origin: tuple[str, int] | None  # run and step of the checkpoint that `train.resume_from` names
    tracking_uri: str | None  # None: no logging
    mlflow_run_id: str
    on_progress: Callable[[Mapping[str, float]], None] | None  # rank 0 calls it with every point of the loss curve
