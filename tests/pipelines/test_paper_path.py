"""The paper's exact path through `dvc repro` on tiny random weights: AutoencoderKL, CLIP, Stable Diffusion's UNet, eps,
PNDM. Its numbers mean nothing; that it runs, and that every part is what it says, does.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pbe.model.weights import Model, load_model
from tests.pipelines.project import Project, make_project
from tests.tiny_weights import tiny_unet, tiny_vae, write_clip, write_stable_diffusion

pytest.importorskip("skimage", reason="needs the sample extra")

STEPS, LR = 12, 1e-5
FIRST_CONV = "conv_in.weight"


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Project:
    weights = tmp_path_factory.mktemp("weights")
    write_stable_diffusion(weights / "sd")
    write_clip(weights / "clip")
    project = make_project(tmp_path_factory.mktemp("chain") / "paper path", "paper-tiny", str(weights))
    project.run("dvc", "repro")
    shutil.rmtree(weights)  # the storage keeps what was read
    return project


def _model(project: Project, variant: str) -> Model:
    return load_model(project.folder / "models" / variant)


@pytest.mark.timeout(400)
def test_every_part_is_the_papers(paper: Project) -> None:
    config = json.loads((paper.folder / "data/encode/manifest.json").read_text())["config"]
    assert (config["codec"]["kind"], config["codec"]["patch_px"], config["codec"]["channels"]) == ("kl", 8, 4)
    assert (config["backbone"]["kind"], config["backbone"]["width"]) == ("clip", 64)
    index = json.loads((paper.folder / "models/full/model_index.json").read_text())
    assert index["_class_name"] == "PaintByExamplePipeline" and index["scheduler"] == ["diffusers", "PNDMScheduler"]
    scheduler = json.loads((paper.folder / "models/full/scheduler/scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert scheduler["prediction_type"] == "epsilon" and scheduler["steps_offset"] == 1
    model = _model(paper, "full")
    assert model.network.unet.config.in_channels == 9 and not model.network.unet.config.class_embed_type
    vae = tiny_vae().state_dict()
    assert all((value == vae[name]).all() for name, value in model.codec.vae.state_dict().items())


def test_training_started_from_stable_diffusion_or_from_nothing(paper: Project) -> None:
    """AdamW moves a parameter by about lr at most in a step."""
    start = tiny_unet().state_dict()
    start[FIRST_CONV], moved = start[FIRST_CONV], {}
    for variant in ("full", "no_prior"):
        now = _model(paper, variant).network.unet.state_dict()
        moved[variant] = max(float((now[name][:, :4] - start[name]).abs().max()) for name in (FIRST_CONV,))
        moved[f"{variant} elsewhere"] = float(
            (now["mid_block.resnets.0.conv1.weight"] - start["mid_block.resnets.0.conv1.weight"]).abs().max()
        )
        moved[f"{variant} new channels"] = float(now[FIRST_CONV][:, 4:].abs().max())
    bound = 2 * STEPS * LR
    assert 0 < moved["full"] < bound and 0 < moved["full elsewhere"] < bound
    assert 0 < moved["full new channels"] < bound
    assert moved["no_prior"] > 0.01 and moved["no_prior new channels"] > 0.01


def test_the_report_names_no_deviation_where_there_is_none(paper: Project) -> None:
    html = (paper.folder / "reports/index.html").read_text()
    assert "image codec" not in html and "exemplar encoder" not in html
    assert "first weights" in html  # of no_prior


@pytest.mark.timeout(200)
def test_an_export_is_fine_tuned_when_train_init_names_it(paper: Project) -> None:
    (paper.folder / "models/full").rename(paper.folder / "published")
    sd = next(line.strip() for line in (paper.folder / "params.yaml").read_text().splitlines() if "init:" in line)
    paper.edit_params(sd, "init: published")
    paper.run("pipelines", "train", "--variant", "full")
    before, now = load_model(paper.folder / "published"), _model(paper, "full")
    pairs = zip(before.network.parameters(), now.network.parameters(), strict=True)
    moved = max(float((new - old).abs().max().detach()) for old, new in pairs)
    assert 0 < moved < 2 * STEPS * LR  # the mapper too: a random one would be far off
    run = json.loads((paper.folder / "data/train/full/manifest.json").read_text())["run"]
    assert len(list((paper.folder / ".store/runs").iterdir())) == 3
    assert (paper.folder / ".store/runs" / run).is_dir()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("init: published", "init: nowhere", "nowhere: no such folder"),
        ("attention_heads: 8", "attention_heads: 4", "attention_head_dim is 8, here it is 4; set train.unet.attention"),
    ],
)
@pytest.mark.timeout(120)
def test_weights_that_do_not_fit_are_one_line(paper: Project, old: str, new: str, message: str) -> None:
    paper.edit_params(old, new)
    try:
        result = paper.run("pipelines", "train", "--variant", "full", check=False)
    finally:
        paper.edit_params(new, old)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.timeout(120)
def test_a_size_that_the_backbone_does_not_take_is_one_line(paper: Project) -> None:
    """Codec and backbone come from the export: a whole model's folder has both."""
    text = (paper.folder / "params.yaml").read_text()
    params = yaml.safe_load(text)
    params["materialize"]["reference_px"] = 32
    params["encode"]["codec"]["weights"] = params["encode"]["backbone"]["weights"] = "published"
    (paper.folder / "params.yaml").write_text(yaml.safe_dump(params))
    try:
        result = paper.run("pipelines", "encode", check=False)
    finally:
        (paper.folder / "params.yaml").write_text(text)
    assert result.returncode == 1 and "this backbone takes 28 px" in result.stderr and "Traceback" not in result.stderr


def test_the_model_folder_is_whole_without_the_project(paper: Project, tmp_path: Path) -> None:
    shutil.copytree(paper.folder / "published", tmp_path / "published")
    load_model(tmp_path / "published")
