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

from pbe.store import Manifest, Store
from pipelines.train import VERSION
from tests.train.ranks import loss_curve, run_ranks, tiny_config, tiny_encoded, tiny_spec, train

FILE = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 1e-4  # of a loss; without SIMD instructions they differ by 4e-7


def straight_curve(folder: Path, store: Store, encoded: Manifest) -> list[float]:
    """Stage 0 on one rank: no sharding, no communication."""
    run_ranks(train, tiny_spec(store, encoded, tiny_config(zero_stage=0), "golden"), world=1, tmp=folder)
    return loss_curve(store, "golden")


def verdict(losses: Sequence[float]) -> str:
    """What to do if the losses differ from the stored ones; empty if they do not."""
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"version": 0, "losses": []}
    if known["version"] != VERSION:
        return "VERSION of pipelines/train.py is new: `python -m tests.train.golden` writes down its losses"
    if len(losses) == len(known["losses"]) and np.allclose(losses, known["losses"], rtol=TOLERANCE, atol=0):
        return ""
    return (
        "training has other losses for the same settings and rows: if that is meant, raise VERSION in "
        "pipelines/train.py, then `python -m tests.train.golden`. If only settings of profile tiny have changed, "
        "`python -m tests.train.golden --settings`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.train.golden", description=__doc__)
    parser.add_argument("--settings", action="store_true", help="settings of profile tiny have changed, not the code")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/store")
        losses = straight_curve(Path(folder), store, tiny_encoded(store))
    told = verdict(losses)
    if "raise VERSION" in told and not args.settings:
        sys.exit(told)
    FILE.write_text(json.dumps({"version": VERSION, "losses": [float(f"{loss:.7g}") for loss in losses]}) + "\n")


if __name__ == "__main__":
    main()
