"""What all benchmarks have in common: --device. They themselves are run by `make bench`."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.benchmarks.device import now, open_device

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path for path in (ROOT / "tests" / "benchmarks").glob("*.py") if path.name != "device.py")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_benchmark_takes_the_device(program: Path) -> None:
    assert "add_device(parser)" in program.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("setting", "device"), [((), "cpu"), (("DEVICE=cuda",), "cuda")])
def test_make_bench_runs_all_of_them_on_one_device(
    setting: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "of another program")
    command = ["make", "--no-print-directory", "-n", "bench", *setting]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [loop] = [line for line in printed.splitlines() if "for file in" in line]
    named = loop.split("for file in ")[1].split(";")[0].split()
    assert named == [str(path.relative_to(ROOT)) for path in PROGRAMS]
    assert f'"$file" --device {device}; done' in loop


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        open_device("cuda")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "--device cuda: torch sees no GPU here\n"


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 0)
    assert now(device, on_processor=lambda: -1.0) > 0  # the wall clock, whatever is read on the processor
    assert waited == [device]
    assert now(torch.device("cpu"), on_processor=lambda: -1.0) == -1.0
    assert waited == [device]
