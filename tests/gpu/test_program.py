"""`make gpu` itself: hanging or dying processes are ended, pages show failures, and every part can be rehearsed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.memory import CARDS
from pbe.places import repo_root
from tests.gpu.process import CaseError, DeviceProcess
from tests.gpu.report import failures, missed, page

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DeviceProcess]:
    process = DeviceProcess("cpu", tmp_path / "cpu.log")
    yield process
    process.close()


def double(device: torch.device, value: int) -> tuple[str, int, int]:
    return device.type, 2 * value, os.getpid()


def count_then_hang(device: torch.device) -> Iterator[int]:
    yield 1
    time.sleep(600)


def die(device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_an_error(device: torch.device) -> None:
    raise ValueError("two\nlines")


def test_what_fails_costs_its_own_result_alone(process: DeviceProcess) -> None:
    kind, value, first = process.result(double, 4, limit_s=60)
    assert (kind, value) == ("cpu", 8)
    with pytest.raises(CaseError, match="ValueError: two lines"):
        process.result(raise_an_error, limit_s=60)
    assert process.result(double, 5, limit_s=60) == ("cpu", 10, first)  # the process still works
    hanging = process.results(count_then_hang, limit_s=1)
    assert next(hanging) == 1  # earlier results stay
    with pytest.raises(CaseError, match="stopped after 1 s"):
        next(hanging)
    with pytest.raises(CaseError, match="its process died"):
        process.result(die, limit_s=60)
    assert process.result(double, 6, limit_s=60)[2] != first


SETTINGS = {"precision": "fp32", "micro_batch": 4, "accumulation": 1, "kernels": {"sdpa": True}}


def test_a_page_says_what_failed_and_what_was_missed() -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "parity": [
            {"case": "a", "difference": 2e-3, "bound": 1e-3, "missed": True},
            {"case": "b", "failed": "stopped after 90 s"},
        ],
        "peers": [{"case": "bare", "ours_over_theirs": 0.9}],
        "cards": [{"case": "of-8gb", "peak_gib": 7.7, "card_gb": 8}, {"case": "of-9gb", "peak_gib": 7.7, "card_gb": 9}],
        "ladder": [{"case": "naive", "rows_per_s": 2.0, "data_frac": 0.02, "settings": SETTINGS}],
    }
    results = {"machine": {"device": "cuda", "card": "Some|Card"}, "seconds": 1.0, "parts": rows}
    assert failures(results) == ["parity, a: outside its bound", "parity, b: stopped after 90 s"]
    assert len(missed(results)) == 3
    text = page(results)
    assert "| a | 2.0e-03 | 1.0e-03 | yes |" in text and "- card: Some\\|Card" in text
    assert "- parity, b: stopped after 90 s" in text
    results["machine"] = {"device": "cpu"}
    assert page(results).startswith("# Rehearsal") and not missed(results)


@pytest.mark.slow
def test_the_program_is_rehearsed(tmp_path: Path) -> None:
    """All parts but doctor and parity, which take minutes here: `make gpu DEVICE=cpu` runs them too."""
    parts = ["card", "ladder", "cards", "peers", "stops", "encode", "edit", "speedrun", "compile"]
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--out", str(tmp_path), "--only", *parts]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == parts
    rows = {part: {row["case"]: row for row in found} for part, found in results["parts"].items()}
    assert all(rows.values()) and not failures(results)
    assert rows["ladder"]["naive float32"]["rows_per_s"] > 0
    # both losses are of the same kind: noise predicted by an untrained network
    assert 0.8 < rows["ladder"]["+ TF32"]["loss"] < 1.3
    assert list(rows["cards"]) == list(CARDS) and all(0.8 < row["loss"] < 1.3 for row in rows["cards"].values())
    finite = [place for place in rows["stops"]["training"]["places"] if place.startswith("pbe/train/finite.py")]
    assert finite, "the guards' reads are among what is counted"
    assert (tmp_path / "GPU.md").read_text().startswith("# Rehearsal")


def test_it_ends_where_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path), "--only", "card"]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "gpu: nothing can be measured here: " in done.stderr and "Traceback" not in done.stderr
