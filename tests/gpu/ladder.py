"""The ladder: the gain of each training setting at the paper's size, on top of the settings that helped before."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.memory import GIB, peak_of
from pbe.model.architecture import Architecture
from pbe.model.unet import new_network
from pbe.train.settings import TrainConfig
from tests.gpu.process import CaseError, DeviceProcess
from tests.gpu.sizes import Sizes
from tests.gpu.training import measure_training, paper_config

LIMIT_S, FIRST_LIMIT_S = 60.0, 120.0
COMPILE_LIMIT_S = 240.0
ZERO_STAGE = 1  # used by the ladder, which compares the other stages at its end

NAIVE: dict[str, bool | int] = {
    "sdpa": False,
    "tf32": False,
    "channels_last": False,
    "compile": False,
    "fused_adamw": False,
    "checkpointed_levels": 4,
}
# Each is tried on top of what has helped so far. torch.compile comes at the end of the program: it takes longest to
# start, and again for every other shape.
CHANGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("TF32", {"kernels": {"tf32": True}}),
    ("bf16 autocast", {"precision": "bf16_autocast"}),
    ("bf16, float32 masters", {"precision": "bf16"}),
    ("sdpa", {"kernels": {"sdpa": True}}),
    ("channels_last", {"kernels": {"channels_last": True}}),
    ("fused AdamW", {"kernels": {"fused_adamw": True}}),
    ("only the finest level recomputed", {"kernels": {"checkpointed_levels": 1}}),
    ("no activation recomputed", {"kernels": {"checkpointed_levels": 0}}),
)


@dataclass(frozen=True)
class Settings:
    precision: str = "fp32"
    zero_stage: int = ZERO_STAGE
    micro_batch: int = 0
    accumulation: int = 1
    kernels: tuple[tuple[str, bool | int], ...] = tuple(NAIVE.items())

    def changed(self, change: Mapping[str, Any]) -> "Settings":
        values = {**vars(self), **change, "kernels": tuple((dict(self.kernels) | change.get("kernels", {})).items())}
        return Settings(**values)

    def config(self, sizes: Sizes) -> TrainConfig:
        return paper_config(
            sizes,
            precision=self.precision,
            zero_stage=self.zero_stage,
            micro_batch=self.micro_batch,
            batch=self.micro_batch * self.accumulation,
            kernels=dict(self.kernels),
        )


class Ladder:
    """Climbs the ladder; `best` is the fastest setting so far, and later parts use it."""

    def __init__(
        self,
        process: DeviceProcess,
        work: Path,
        sizes: Sizes,
        peak_flops: float | None,
        limit: Callable[[float], float],  # seconds that a case may take, to what is left of them
    ) -> None:
        self._limit = limit
        self._process, self._work, self._sizes, self._peak_flops = process, work, sizes, peak_flops
        self._quick = replace(sizes, window_steps=max(2, sizes.window_steps // 2), windows=2)
        self._flops_per_row = 3 * forward_flops(sizes.arch)  # a backward pass is two forward passes
        self._rates: dict[Settings, float] = {}

    @property
    def best(self) -> Settings:
        """The choice without a ladder: the openimages profile's settings, but in bf16 with float32 masters."""
        if not self._rates:
            kernels = paper_config(self._sizes).kernels.model_dump()
            return Settings("bf16", ZERO_STAGE, self._sizes.micro_batch, 1, tuple(kernels.items()))
        return max(self._rates, key=lambda settings: self._rates[settings])

    def climb(self) -> Iterator[dict[str, Any]]:
        naive = Settings(micro_batch=self._sizes.micro_batch)
        yield self._rung("naive float32", naive, FIRST_LIMIT_S)
        for name, change in CHANGES:
            yield self._rung(f"+ {name}", self.best.changed(change), LIMIT_S)
        for micro_batch in self._sizes.larger_micro_batches:
            yield self._rung(f"+ micro-batch {micro_batch}", self.best.changed({"micro_batch": micro_batch}), LIMIT_S)
        best = self.best
        for stage in (0, 2, 3):
            name = f"ZeRO {stage} in place of {ZERO_STAGE}" + (", which waits at every layer" if stage == 3 else "")
            yield self._rung(name, best.changed({"zero_stage": stage}), LIMIT_S)
        accumulating = best.changed({"accumulation": 4})
        yield self._rung("4 micro-batches a step", accumulating, FIRST_LIMIT_S, competes=False)

    def compiled(self) -> dict[str, Any]:
        return self._rung("+ torch.compile", self.best.changed({"kernels": {"compile": True}}), COMPILE_LIMIT_S)

    def _rung(self, name: str, settings: Settings, limit_s: float, *, competes: bool = True) -> dict[str, Any]:
        competes = competes and settings.zero_stage == ZERO_STAGE
        before = self._rates.get(self.best) if self._rates else None
        row: dict[str, Any] = {"case": name, "micro_batch": settings.micro_batch}
        with ThreadPoolExecutor(1) as beside:
            predicted = beside.submit(predicted_gib, self._sizes, settings)
            try:
                sizes = self._sizes if settings.zero_stage == ZERO_STAGE and settings.accumulation == 1 else self._quick
                cfg = settings.config(sizes)
                measured = self._process.result(measure_training, self._work, sizes, cfg, limit_s=self._limit(limit_s))
            except CaseError as error:
                return row | {"failed": str(error)}
        rate = measured["rows_per_s"]
        if competes:
            self._rates[settings] = rate
        row |= {"rows_per_s": rate, "over_best_before": rate / before if before else None}
        row["of_bf16_peak"] = rate * self._flops_per_row / self._peak_flops if self._peak_flops else None
        row |= {"peak_gib": measured["peak_gib"], "predicted_gib": predicted.result()}
        row |= {key: measured[key] for key in ("data_frac", "start_s", "loss")}
        return row | {"settings": vars(settings) | {"kernels": dict(settings.kernels)}}


def forward_flops(arch: Architecture) -> int:
    """Floating-point operations of one row's forward pass, counted by torch on tensors without memory."""
    latent = (1, arch.latent_channels, arch.latent_px, arch.latent_px)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        network = new_network(arch)
        with counter:
            network(
                torch.empty(latent),
                torch.empty(1, dtype=torch.int64),
                masked_latent=torch.empty(latent),
                keep_mask_latent=torch.empty(1, 1, *latent[2:]),
                exemplar_tokens=torch.empty(1, 1, arch.backbone_width),
                drop_condition=torch.empty(1, dtype=torch.bool),
            )
    return counter.get_total_flops()


def predicted_gib(sizes: Sizes, settings: Settings) -> float | None:
    """The estimate of infra/memory.py for one rank; None if attention is written out: it does not count that."""
    cfg = settings.config(sizes)
    return peak_of(cfg, sizes.arch) / GIB if cfg.kernels.sdpa else None
