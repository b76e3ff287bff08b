"""The losses of the tiny training run, and what they were when `python -m tests.train.golden` wrote golden_losses.json.

All other curves of the tests are compared with one that the same code has just made: they could drift together.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbe.model.folder import STEM, STEMS
from pbe.model.weight_store import store_weights
from pbe.store import Manifest, Store
from pbe.train.spec import TrainSpec
from pipelines.train import VERSION
from tests.train.ranks import loss_curve, run_ranks, tiny_config, tiny_encoded, tiny_spec, train

FILE = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 1e-4  # of a loss; without SIMD instructions they differ by 4e-7


LORA = {"lora": {"rank": 3, "alpha": 6}}
PARTS: dict[str, Any] = {"lora": LORA, "cross_attention": "cross_attention"}  # of the UNet, which the run `golden` made
PART_STEPS = 12


def straight_curve(folder: Path, store: Store, encoded: Manifest) -> list[float]:
    """Stage 0 on one rank: no sharding, no communication."""
    run_ranks(train, tiny_spec(store, encoded, tiny_config(zero_stage=0), "golden"), world=1, tmp=folder)
    return loss_curve(store, "golden")


def store_base(store: Store) -> tuple[str, str]:
    """Storage paths of the UNet and the image encoder that the run `golden` exported."""
    export = Path(store.path("runs/golden/export"))
    unet = store_weights(store, export / "unet", "unet", STEM)
    return unet, store_weights(store, export / "image_encoder", "image_encoder", *STEMS)


def part_spec(
    store: Store, encoded: Manifest, base: tuple[str, str], part: str, name: str, **changes: Any
) -> TrainSpec:
    """A training of a part of the UNet; stage 0 on one rank unless `changes` say otherwise."""
    spec = {key: changes.pop(key) for key in ("on_progress", "adapter", "origin") if key in changes}
    settings = {"trainable": PARTS[part], "init": "models/golden", "zero_stage": 0, "steps": PART_STEPS} | changes
    cfg = tiny_config(**settings)
    return tiny_spec(store, encoded, cfg, name, initial=base, base_name="models/golden", **spec)


def part_curve(folder: Path, store: Store, encoded: Manifest, base: tuple[str, str], part: str) -> list[float]:
    run_ranks(train, part_spec(store, encoded, base, part, f"straight-{part}"), world=1, tmp=folder)
    return loss_curve(store, f"straight-{part}")


def verdict(losses: Sequence[float], part: str = "all") -> str:
    """What to do if the losses differ from the stored ones; empty if they do not."""
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"version": 0, "losses": {}}
    if known["version"] != VERSION:
        return "VERSION of pipelines/train.py is new: `python -m tests.train.golden` writes down its losses"
    stored = known["losses"].get(part, [])
    if len(losses) == len(stored) and np.allclose(losses, stored, rtol=TOLERANCE, atol=0):
        return ""
    return (
        f"training of {part} has other losses for the same settings and rows: if that is meant, raise VERSION in "
        "pipelines/train.py, then `python -m tests.train.golden`. If only settings of profile tiny have changed, "
        "`python -m tests.train.golden --settings`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.train.golden", description=__doc__)
    parser.add_argument("--settings", action="store_true", help="settings of profile tiny have changed, not the code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Store(f"{name}/store")
        encoded = tiny_encoded(store)
        curves = {"all": straight_curve(folder, store, encoded)}
        base = store_base(store)
        curves |= {part: part_curve(folder, store, encoded, base, part) for part in PARTS}
    for part, losses in curves.items():
        told = verdict(losses, part)
        if "raise VERSION" in told and not args.settings:
            sys.exit(told)
    rounded = {part: [float(f"{loss:.7g}") for loss in losses] for part, losses in curves.items()}
    FILE.write_text(json.dumps({"version": VERSION, "losses": rounded}) + "\n")


if __name__ == "__main__":
    main()
