"""infra/cost.py: its properties, and the bytes that two real ranks send against those that it computes."""

import sys
from pathlib import Path

import pytest

from infra.cost import bytes_sent, main
from tests.benchmarks.link_bytes import TINY_BUCKET, Case, measured


def test_one_rank_sends_nothing_and_many_what_deepspeed_reduces() -> None:
    assert bytes_sent(3, ranks=1, size=1e9, micro_batches=4) == 0
    assert [bytes_sent(stage, ranks=10**9, size=1) for stage in range(4)] == pytest.approx([2, 3, 3, 4])
    assert [bytes_sent(stage, ranks=10**9, size=1, micro_batches=4) for stage in range(4)] == pytest.approx(
        [2, 3, 9, 16]
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel how many bytes sockets sent")
def test_two_real_ranks_send_these_bytes(tmp_path: Path) -> None:
    wanted = [Case(1, micro_batches=2), Case(2, "bf16", 2), Case(3, micro_batches=2, bucket=TINY_BUCKET)]
    count, sent = measured(wanted, world=2, tmp=tmp_path)
    assert sent == pytest.approx([case.computed(count, 2) for case in wanted], rel=0.03)


def test_your_own_step_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    """32 rows in 2 s are 16 rows/s: 272,350 steps of 256 rows take 1,210 GPU-hours, which cost 2,421 at 2 each."""
    arguments = "--gpus 1 --step-s 2 --step-rows 32 --gpu-hour-price 2 --encode-row-s 0.1"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "| 16 |" in printed and "| 1,210 |" in printed and "| 2,421 |" in printed and "| encode |" in printed


@pytest.mark.parametrize("arguments", ["--step-s 0", "--step-s nan", "--gpus 3", "--step-rows 4", "--profile mine"])
def test_bad_input_is_one_line(arguments: str) -> None:
    with pytest.raises(SystemExit, match=r"^infra/cost\.py: .*--\w+.*$"):
        main(arguments.split())
