"""`pbe export`: the same weights to the last bit, and a card that states only what is known."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pbe.cli.__main__ import main
from pbe.export import ExportError, export_model
from pbe.model.tensors import WeightsError
from pbe.model.weights import load_model
from pbe.places import repo_root
from tests.tiny_weights import write_paint_by_example


@pytest.fixture
def project(tmp_path: Path, model_folder: Path) -> Path:
    """A repository whose variant `tiny` was trained and scored."""
    root = tmp_path / "a project"
    (root / "models").mkdir(parents=True)
    model_folder.rename(root / "models" / "tiny")
    files = [path for path in (root / "models/tiny").rglob("*") if path.is_file()]
    export = {
        path.relative_to(root / "models/tiny").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    manifest = root / "data/train/tiny/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"export": export, "run": "tiny-abc"}))
    metrics = root / "data/evaluate/metrics.json"
    metrics.parent.mkdir(parents=True)
    metric = {"value": 0.1234567, "low": 0.1, "high": 0.2, "n": 74, "method": "bootstrap"}
    scored = {
        "protocol": {"run": "tiny-abc", "steps": 20, "seeds": [42]},
        "box": {"exemplar": {"exemplar_gain_x": metric}},
    }
    metrics.write_text(json.dumps({"tiny": scored, "card": {}}))
    _lock(root)
    return root


def _lock(root: Path) -> None:
    stages = {"train@tiny": {"params": {"params.yaml": {"train": {"lr": 0.25}}}}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))


def test_every_tensor_is_the_same_and_the_card_says_how_it_was_made(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "to share"
    export_model(project, "tiny", out)
    before, after = (load_model(folder).network.state_dict() for folder in (project / "models/tiny", out))
    assert before.keys() == after.keys() and all((before[name] - after[name]).abs().max() == 0 for name in before)
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "pbe"
    assert "Opens only in pbe" in card and "lr: 0.25" in card
    assert "| box | exemplar | exemplar_gain_x | 0.1235 | 0.1 to 0.2 | 74 |" in card and "steps 20, seeds [42]" in card
    for path in out.rglob("*.safetensors"):
        assert f"`{path.relative_to(out)}` sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in card
    assert not list(tmp_path.glob(".*"))


def test_half_rounds_the_unet_alone_and_opens_as_float32(project: Path, tmp_path: Path) -> None:
    export_model(project, "tiny", tmp_path / "out", half=True)
    before, after = (load_model(folder).network.state_dict() for folder in (project / "models/tiny", tmp_path / "out"))
    assert {value.dtype for value in after.values()} == {torch.float32}
    rounded = {name: value.half().float() if name.startswith("unet.") else value for name, value in before.items()}
    assert all(torch.equal(after[name], value) for name, value in rounded.items())
    assert any(not torch.equal(before[name], value) for name, value in rounded.items())
    assert "rounded to float16" in (tmp_path / "out/README.md").read_text()


def test_half_refuses_weights_beyond_float16(project: Path, tmp_path: Path) -> None:
    path = project / "models/tiny/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] = 70_000.0
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"not written: conv_in\.weight has values beyond torch\.float16"):
        export_model(project, "tiny", tmp_path / "out", half=True)
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_papers_parts_says_how_diffusers_opens_it(project: Path, tmp_path: Path) -> None:
    export_model(project, str(write_paint_by_example(tmp_path / "published")), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "DiffusionPipeline.from_pretrained" in card and "with your rights" in card
    assert "`pipeline.py` sha256" in card and "`image_encoder/exemplar_encoder.py` sha256" in card
    assert "Its settings and metrics are not known" in card


def test_metrics_of_another_training_are_left_out(project: Path, tmp_path: Path) -> None:
    metrics = project / "data/evaluate/metrics.json"
    metrics.write_text(metrics.read_text().replace("tiny-abc", "tiny-earlier"))
    export_model(project, "tiny", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "have not been scored" in card and "exemplar_gain_x" not in card and "lr: 0.25" in card


def test_settings_of_another_model_are_left_out(project: Path, tmp_path: Path) -> None:
    (project / "models/tiny/pbe.json").write_text((project / "models/tiny/pbe.json").read_text() + " ")
    export_model(project, "tiny", tmp_path / "out")
    assert "lr: 0.25" not in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_is_refused_before_work(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fulll: no such variant or folder; models/ has: tiny"):
        export_model(project, "fulll", tmp_path / "out")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="taken: already exists"):
        export_model(project, "tiny", taken)
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(project: Path, tmp_path: Path) -> None:
    """As if it were full after 4 kB: files of this process alone end there."""
    code = "import resource, sys; from pbe.cli.__main__ import main; " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "export", str(project / "models/tiny"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("pbe: error: ")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_the_command_says_what_opens_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_paint_by_example(tmp_path / "published")
    assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "diffusers and pbe open it" in capsys.readouterr().out
    assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err
