"""infra/SCALING.md holds what infra/scaling.py prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_guide_holds_every_line_that_the_program_prints() -> None:
    command = [sys.executable, str(ROOT / "infra" / "scaling.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    guide = (ROOT / "infra" / "SCALING.md").read_text().splitlines()
    missing = [line for line in printed.splitlines() if line not in guide]
    assert printed.count("|") > 100 and not missing
