"""infra/memory.py: what is counted is what a process takes, and infra/SCALING.md holds what it prints."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.memory import GIB, PAPER, PARAMETERS, PRECISIONS, RANKS, LiveBytes, narrower, states, step_on
from pbe.model.unet import new_network

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "infra" / "memory.py"
SMALL = replace(narrower(PAPER, 32), latent_px=16)


def _printed(*arguments: str) -> str:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_storage_counts_once_and_while_it_lives() -> None:
    with LiveBytes(nn.Identity()) as live:
        numbers = torch.zeros(1000)
        row = numbers.view(10, 100)[3]
        assert live.peak == 4000
        del numbers
        torch.zeros(500).add_(1)
        assert live.peak == 6000  # the row keeps all of it
        del row
        torch.zeros(1200)
        assert live.peak == 6000


def test_weights_are_left_out_and_their_gradients_counted_apart() -> None:
    model = nn.Linear(1000, 10, bias=False)  # 40,000 bytes
    rows = torch.ones(2, 1000)
    with LiveBytes(model) as live:
        for _ in range(2):  # the second gradient is added to the first
            model(rows).sum().backward()
    assert 40_000 <= live.peak < 41_000  # a gradient before it is the weight's
    assert 80_000 <= live.peak_with_gradients < 81_000
    model = nn.Linear(1000, 10, bias=False)
    with LiveBytes(model) as live:
        model(rows).sum().backward()
    assert live.peak_with_gradients < 41_000


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fake_tensors_live_as_real_ones(precision: str) -> None:
    peaks = {}
    for checkpointing in (False, True):
        fake, real = (
            step_on(SMALL, batch=2, precision=precision, checkpointing=checkpointing, fake=fake)
            for fake in (True, False)
        )
        assert fake.peak == pytest.approx(real.peak, rel=0.01)
        assert fake.peak_with_gradients == pytest.approx(real.peak_with_gradients, rel=0.01)
        peaks[checkpointing] = fake.peak
    assert peaks[True] < peaks[False]


@pytest.mark.slow
@pytest.mark.drill
def test_activations_that_are_counted_are_resident() -> None:
    """A third of a GiB of them; infra/memory.py --measure has more cases."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel's high-water mark cannot be set back here: {error}")
    ratio = float(_printed("--one", "32", "2", "fp32", "off").rsplit(",", 1)[1])
    assert 0.9 < ratio < 1.2


def test_the_counted_parameters_are_the_networks() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in new_network(PAPER).parameters()) == PARAMETERS


@pytest.mark.parametrize(
    ("precision", "stage", "bytes_per_parameter"),
    [
        ("fp32", 0, 4 + 8 + 8),  # weights, two moments, gradients and their bucket
        ("fp32", 1, 4 + 12 + 8),  # masters too; gradients twice, as one rank owns all
        ("bf16", 1, 2 + 12 + 8),  # in the step: gradients, flattened, in float32
        ("bf16", 2, 2 + 12 + 8),
    ],
)
def test_one_rank_holds_it_all(precision: str, stage: int, bytes_per_parameter: int) -> None:
    held = states(precision, stage, 1, count=1000, bucket=0)
    assert held.peak(0) - held.buckets == 1000 * bytes_per_parameter


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_sharding_never_costs_memory(precision: str) -> None:
    """But for stage 3, whose parameters all stay gathered at this size under DeepSpeed's defaults."""
    for activations in (0, 10 * GIB):
        peaks = {
            (stage, ranks): states(precision, stage, ranks).peak(activations) for stage in range(4) for ranks in RANKS
        }
        assert all(peaks[stage, 64] < peaks[stage, 8] for stage in (1, 2, 3))
        for ranks in RANKS:
            assert all(more < less for less, more in pairwise(peaks[stage, ranks] for stage in (0, 1, 2)))


def test_the_guide_holds_every_line_of_one_precision() -> None:
    _assert_in_guide(_printed("--precision", "bf16"))


@pytest.mark.drill
def test_the_guide_holds_every_line() -> None:
    _assert_in_guide(_printed())


def _assert_in_guide(printed: str) -> None:
    guide = (ROOT / "infra" / "SCALING.md").read_text().splitlines()
    missing = [line for line in printed.splitlines() if line not in guide]
    assert printed.count("|") > 100 and not missing
