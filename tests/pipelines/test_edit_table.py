"""`pbe edit --table --actors`: a real Ray of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pbe.cli.__main__ import main
from pbe.data import images
from tests.pipelines.project import FOREIGN, ROOT


@pytest.mark.timeout(280)
def test_actors_write_the_same_files_as_one_process(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixteen edits the first eight, a forward, are there already; one more row only the editor finds bad."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("photo", "reference"):
        (tmp_path / f"{name}.png").write_bytes(images.encode_png(rng.integers(0, 256, (24, 40, 3)).astype(np.uint8)))
    row = {"photo": "photo.png", "box": "8,5,25,15", "reference": "reference.png"}
    rows = [row | {"seed": seed} for seed in range(16)] + [row | {"box": "0,0,40,24"}]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["edit", "--table", "edits.jsonl", "--model", "models/tiny", "--steps", "2", "--out"]
    assert main([*options, "here"]) == 1
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    assert main(["edit", "--table", "first.jsonl", *options[3:], "ray"]) == 0
    command = [sys.executable, "-m", "pipelines.commands.pbe", *options, "ray", "--actors", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "8 edits written, 8 were there, 1 failed" in done.stdout
    here, ray = ({path.name: path.read_bytes() for path in Path(out).glob("*.png")} for out in ("here", "ray"))
    assert here == ray and len(here) == 16
    (error,) = [line for line in map(json.loads, Path("ray/edits.jsonl").read_text().splitlines()) if "error" in line]
    assert error["row"] == 17 and "covers the whole photo" in error["error"]
