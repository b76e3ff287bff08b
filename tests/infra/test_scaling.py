"""infra/SCALING.md contains what the programs of infra print."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["scaling.py", "cost.py", "memory.py", "memory.py --cards"])
def test_the_guide_holds_every_line_that_the_program_prints(program: str) -> None:
    name, *options = program.split()
    command = [sys.executable, str(ROOT / "infra" / name), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    guide = (ROOT / "infra" / "SCALING.md").read_text().splitlines()
    missing = [line for line in printed.splitlines() if line not in guide]
    assert printed.count("|") > 30 and not missing
