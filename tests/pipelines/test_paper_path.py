"""The paper's exact path through `dvc repro` on tiny random weights: AutoencoderKL, CLIP, Stable Diffusion's UNet, eps,
PNDM. Its numbers mean nothing; that it runs, and that every part is what it says, does.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pbe.data import images
from pbe.data.masks import unpack_mask
from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.evaluate.features.clip import load_clip_extractor
from pbe.evaluate.metrics.mixture import load_mixture, mixture_digest
from pbe.model.adapter import load_adapted, read_adapter
from pbe.model.weights import Model, load_model
from pbe.protocol import UPSTREAM
from tests.pipelines.project import Project, make_project
from tests.tiny_weights import tiny_unet, tiny_vae, vae_of, write_all

pytestmark = pytest.mark.slow

pytest.importorskip("skimage", reason="needs the sample extra")

STEPS, LR = 12, 1e-5
FIRST_CONV = "conv_in.weight"


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Project:
    weights = tmp_path_factory.mktemp("weights")
    write_all(weights)
    project = make_project(tmp_path_factory.mktemp("chain") / "paper path", "paper-tiny", str(weights))
    project.run_to_the_end("pipelines", "repro")
    (weights / "mixture.npz").rename(project.folder / "mixture.npz")
    shutil.copytree(weights / "clip-extractor", project.folder / "clip-extractor")
    shutil.rmtree(weights)  # the storage keeps what was read
    return project


def _model(project: Project, variant: str) -> Model:
    return load_model(project.folder / "models" / variant)


def _rows(project: Project, manifest: str, dataset: str) -> list[dict[str, Any]]:
    units = json.loads((project.folder / manifest).read_text())["units"]
    files = [file for unit in units for file in unit["files"] if file["dataset"] == dataset]
    return [row for f in files for row in pq.read_table(project.folder / ".store" / f["path"]).to_pylist()]


@pytest.mark.timeout(1500)  # the first test runs the chain, with four rows by other models
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
    assert all((value == vae[name]).all() for name, value in vae_of(model).state_dict().items())


def test_the_papers_three_numbers_by_its_protocol(paper: Project) -> None:
    """clip_fid, qs and clip_score of the stored edits, computed here again from pixels, in the paper's words."""
    found = json.loads((paper.folder / "data/evaluate/metrics.json").read_text())
    numbers, protocol = found["full"]["box"]["exemplar"], found["full"]["protocol"]
    assert {"clip_fid", "qs", "clip_score", "copy_paste", "background_psnr_db"} <= set(numbers)
    assert (protocol["protocol"], protocol["guidance_scale"]) == ("upstream", 5.0)
    assert numbers["background_psnr_db"]["value"] < 60  # nothing is pasted back
    assert numbers["background_max_error"]["value"] > 1 > numbers["background_ssim"]["value"]
    assert numbers["background_lpips_alex"]["value"] > 0.001 and "hole_lpips_alex" in numbers
    assert {"frechet_dino", "similarity_dino", "exemplar_gain_dino"} <= set(numbers)
    lpips, html = found["card"]["lpips"], (paper.folder / "reports/index.html").read_text()
    assert f"<dt>LPIPS</dt><dd>0.1, alex <code>{lpips['digest']}</code>" in html and "Background LPIPS" in html
    clip, mixture = load_clip_extractor(paper.folder / "clip-extractor"), load_mixture(paper.folder / "mixture.npz")

    bench = {row["bench_id"]: row for row in _rows(paper, "data/bench/manifest.json", "bench")}
    edits = [
        row for row in _rows(paper, "data/edit/full/manifest.json", "edits") if row["reference_kind"] == "exemplar"
    ]
    pictures = [images.decode(row["edit"]) for row in edits]
    features = clip(pictures, batch_rows=4)
    real_images = clip(
        [images.decode(row["picture"]) for row in _rows(paper, "data/bench/manifest.json", "real")], batch_rows=4
    )
    cov_a, cov_b = np.cov(features, rowvar=False), np.cov(real_images, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    fid = np.sum((features.mean(0) - real_images.mean(0)) ** 2) + np.trace(cov_a + cov_b) - 2 * overlap
    assert numbers["clip_fid"]["value"] == pytest.approx(fid, rel=1e-5)
    likelihoods = np.log(
        np.sum(
            [
                weight
                * np.prod(np.diag(r))
                * np.exp(-0.5 * np.sum(((features - mean) @ r) ** 2, 1))
                / (2 * np.pi) ** (features.shape[1] / 2)
                for weight, mean, r in zip(mixture.weights, mixture.means, mixture.precisions_cholesky, strict=True)
            ],
            axis=0,
        )
    )
    assert found["card"]["extractors"]["clip"]["mixture_digest"] == mixture_digest(mixture)[:16]
    qs = 100 * np.mean(np.clip(likelihoods / 300, 0, 1))
    assert qs > 1 and numbers["qs"]["value"] == pytest.approx(qs, rel=1e-5)
    cosines = []
    for row, picture in zip(edits, pictures, strict=True):
        item = bench[row["bench_id"]]
        ys, xs = np.nonzero(unpack_mask(item["box_hole_mask"], width_px=picture.shape[1], height_px=picture.shape[0]))
        region = picture[ys[0] : ys[-1], xs[0] : xs[-1]]  # without the last row and column
        a = clip([region], preprocessing="region", batch_rows=1)[0]
        b = clip([images.decode(item["exemplar"])], preprocessing="reference", batch_rows=1)[0]
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert numbers["clip_score"]["value"] == pytest.approx(100 * np.mean(cosines), rel=1e-5)


def test_other_peoples_models_are_rows_of_the_table(paper: Project) -> None:
    """Each filled every item with weights of the storage; theirs are gone. Each is in MLflow and in the report."""
    from mlflow import MlflowClient

    found = json.loads((paper.folder / "data/evaluate/metrics.json").read_text())
    html = (paper.folder / "reports/index.html").read_text()
    items = found["full"]["box"]["exemplar"]["clip_score"]["n"]
    client = MlflowClient(f"sqlite:///{paper.folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_name for run in client.search_runs(experiments)}
    for name in ("inpaint", "blended_text", "blended_image", "klein"):
        assert found[name]["box"]["exemplar"]["clip_score"]["n"] == items and "withheld" not in found[name]["protocol"]
        config = json.loads((paper.folder / f"data/edit/{name}/manifest.json").read_text())["config"]
        assert all((paper.folder / ".store" / path / "record.json").is_file() for path in config["weights"].values())
        assert f"baseline-{name}" in runs and f">{name}</strong></span>: no training (" in html
    # a text says nothing of the reference, a gradient does
    assert found["inpaint"]["box"]["exemplar"]["exemplar_gain_clip"]["value"] == 0
    assert found["blended_image"]["box"]["exemplar"]["exemplar_gain_clip"]["value"] != 0


def test_training_started_from_stable_diffusion_or_from_nothing(paper: Project) -> None:
    """AdamW moves a parameter by about lr at most in a step."""
    start = tiny_unet().state_dict()
    moved = {}
    for variant in ("full", "no_prior", "text"):
        now = _model(paper, variant).network.unet.state_dict()
        moved[variant] = float((now[FIRST_CONV][:, :4] - start[FIRST_CONV]).abs().max())
        moved[f"{variant} elsewhere"] = float(
            (now["mid_block.resnets.0.conv1.weight"] - start["mid_block.resnets.0.conv1.weight"]).abs().max()
        )
        moved[f"{variant} new channels"] = float(now[FIRST_CONV][:, 4:].abs().max())
    bound = 2 * STEPS * LR
    assert 0 < moved["full"] < bound and 0 < moved["full elsewhere"] < bound
    assert 0 < moved["full new channels"] < bound
    assert 0 < moved["text"] < bound and 0 < moved["text elsewhere"] < bound
    assert moved["no_prior"] > 0.01 and moved["no_prior new channels"] > 0.01


def test_words_are_scored_on_the_pictures_items_against_the_exemplar_that_they_describe(paper: Project) -> None:
    """The paper's Fig. 8. The CLIP score of one form, computed here again from pixels."""
    editor = Editor.load(paper.folder / "models/text", device="cpu")
    assert editor.card.condition == "text" and not (paper.folder / "models/text/image_encoder").exists()
    found = json.loads((paper.folder / "data/evaluate/metrics.json").read_text())
    assert set(found["text"]["box"]) == {"label", "label_colour"} and set(found["full"]["box"]) == {"exemplar"}
    numbers = {form: scores["clip_score"] for form, scores in found["text"]["box"].items()}
    assert {scores["n"] for scores in numbers.values()} == {found["full"]["box"]["exemplar"]["clip_score"]["n"]}
    paired = json.loads((paper.folder / "data/evaluate/paired.json").read_text())["methods"]["text"]["box"]
    exemplar = found["full"]["box"]["exemplar"]["clip_score"]["value"]
    difference = numbers["label"]["value"] - exemplar
    assert paired["label"]["clip_score"]["difference"]["value"] == pytest.approx(difference, rel=1e-6)
    bench = {row["bench_id"]: row for row in _rows(paper, "data/bench/manifest.json", "bench")}
    edits = [row for row in _rows(paper, "data/edit/text/manifest.json", "edits") if row["reference_kind"] == "label"]
    item = bench[edits[0]["bench_id"]]
    source = images.decode(item["source"])
    hole_mask = unpack_mask(item["box_hole_mask"], width_px=source.shape[1], height_px=source.shape[0])
    again = editor.edit_crops(
        source[None],
        hole_mask[None],
        [f"a photo of a {item['label_name'].lower()}"],
        seeds=[int(row_rng(edits[0]["seed"], item["bench_id"], "edit").integers(2**62))],
        sampling=Sampling(5.0, 4),
        protocol=UPSTREAM,
    )
    assert np.abs(again[0].astype(int) - images.decode(edits[0]["edit"])).max() <= 1
    html = (paper.folder / "reports/index.html").read_text()
    assert "Words or a picture" in html and "text: label and colour" in html and "full: exemplar" in html
    assert f"a photo of a {item['label_name'].lower()}" in html


def test_the_report_names_no_deviation_where_there_is_none(paper: Project) -> None:
    html = (paper.folder / "reports/index.html").read_text()
    assert "image codec" not in html and "exemplar encoder" not in html
    assert "first weights" in html  # of no_prior


@pytest.mark.timeout(200)
def test_an_export_is_fine_tuned_when_train_init_names_it(paper: Project) -> None:
    (paper.folder / "models/full").rename(paper.folder / "published")
    sd = next(line.strip() for line in (paper.folder / "params.yaml").read_text().splitlines() if "init:" in line)
    paper.edit_params(sd, "init: published")
    card = paper.folder / "published/pbe.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"guidance_scale": 2.5}))
    paper.run("pipelines", "train", "--variant", "full")
    before, now = load_model(paper.folder / "published"), _model(paper, "full")
    pairs = zip(before.network.parameters(), now.network.parameters(), strict=True)
    moved = max(float((new - old).abs().max().detach()) for old, new in pairs)
    assert 0 < moved < 2 * STEPS * LR  # the mapper too: a random one would be far off
    assert now.card.guidance_scale == 2.5
    run = json.loads((paper.folder / "data/train/full/manifest.json").read_text())["run"]
    assert len(list((paper.folder / ".store/runs").iterdir())) == 4
    assert (paper.folder / ".store/runs" / run).is_dir()


@pytest.mark.timeout(400)
def test_an_adapter_is_trained_and_then_goes_on(paper: Project) -> None:
    """After the test above: init is an export. What continues is the adapter, on the base that it names."""
    all_of_it, lora = "full: {}", "full: {train: {trainable: {lora: {rank: 2}}}}"
    paper.edit_params(all_of_it, lora)
    paper.run("pipelines", "train", "--variant", "full")
    first = paper.folder / "models/full"
    assert load_adapted(first / "adapter", paper.folder / "published").card == load_model(first).card
    first.rename(paper.folder / "tuned")
    paper.edit_params("init: published", "init: tuned/adapter")
    paper.run("pipelines", "train", "--variant", "full")
    adapter = read_adapter(paper.folder / "models/full/adapter")
    assert adapter.base == read_adapter(paper.folder / "tuned/adapter").base
    assert adapter.base.name == "published"
    named = json.loads((paper.folder / "data/train/full/manifest.json").read_text())["initial"]
    assert [path.split("/")[2].split("-")[0] for path in named] == ["unet", "image_encoder", "adapter"]
    paper.edit_params("init: tuned/adapter", "init: published")
    paper.edit_params(lora, all_of_it)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("init: published", "init: nowhere", "nowhere: no such folder"),
        ("attention_heads: 8", "attention_heads: 4", "attention_head_dim is 8, but 4 here; set train.unet.attention"),
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
