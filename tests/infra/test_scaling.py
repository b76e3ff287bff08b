"""infra/SCALING.md contains what infra/scaling.py and infra/cost.py print."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["scaling.py", "cost.py", "cost.py --memory"])
def test_the_guide_holds_every_line_that_the_program_prints(program: str) -> None:
    name, *options = program.split()
    command = [sys.executable, str(ROOT / "infra" / name), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    guide = (ROOT / "infra" / "SCALING.md").read_text().splitlines()
    missing = [line for line in printed.splitlines() if line not in guide]
    assert printed.count("|") > 50 and not missing
