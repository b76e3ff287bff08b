"""The recipe that scores published weights on COCOEE, from the checkpoint's file to the three numbers: profile cocoee,
its sizes made tiny. The archive has all its 3,500 items, of which a few are taken."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pbe.data import images
from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.evaluate.bench.cocoee import ITEMS
from pbe.model.weights import load_model
from pbe.protocol import UPSTREAM
from tests.evaluate.test_cocoee import write_cocoee
from tests.ldm_layout import ldm_model, paint_by_example, sizes_of
from tests.pipelines.project import Project, make_project, metrics
from tests.tiny_weights import state_of, write_clip_extractor, write_mixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

pytest.importorskip("skimage", reason="needs the sample extra")

TAKEN, DISTINCT = 6, 12


def _write_whole_archive(folder: Path) -> None:
    """Of few distinct pictures: the others are links to them."""
    write_cocoee(folder, list(range(1, DISTINCT + 1)))
    for number in range(DISTINCT + 1, ITEMS + 1):
        like = (number - 1) % DISTINCT + 1
        for part, suffix in (("GT_3500", "GT"), ("Mask_bbox_3500", "mask"), ("Ref_3500", "ref")):
            os.link(folder / part / f"{like:012d}_{suffix}.png", folder / part / f"{number:012d}_{suffix}.png")
    np.save(folder / "id_list.npy", np.random.default_rng(0).permutation(np.arange(1, ITEMS + 1)))


def _make_tiny(project: Project) -> None:
    here = {"cpus": 1, "gpus": 0, "memory_gib": 1}
    project.set_params(
        encode__per_actor=here,
        train__per_worker=here,
        **sizes_of(ldm_model()),
        bench__max_items=TAKEN,
        edit__steps=2,
        edit__items_per_unit=3,
        edit__per_actor=here,
        evaluate__per_actor=here,
        evaluate__statistics={"resamples": 100, "subsets": 20},
        sweep={
            "variant": "full",
            "guidance_scales": [1.0, 5.0],
            "items": 4,
            "diversity": {"items": 4, "seeds": [1, 2]},
        },
        baselines={},
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    root = tmp_path_factory.mktemp("weights and bench")
    torch.save({"state_dict": paint_by_example(ldm_model())}, root / "model.ckpt")
    _write_whole_archive(root / "test_bench")
    write_mixture(root / "mixture.npz", write_clip_extractor(root / "clip-vit-base-patch32"))
    (root / "test2017").mkdir()
    rng = np.random.default_rng(1)
    for number in range(30):
        photo = images.resize(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8), width_px=60, height_px=48)
        (root / "test2017" / f"{number:012d}.png").write_bytes(images.encode_png(photo))
    project = make_project(tmp_path_factory.mktemp("chain") / "published", "cocoee", str(root))
    project.run("pbe.cli", "import", str(root / "model.ckpt"), "--out", str(root / "published"))
    _make_tiny(project)
    project.run_to_the_end("dvc", "repro", "evaluate")
    return project, root


def test_the_exported_weights_are_the_published_ones(scored: tuple[Project, Path]) -> None:
    project, root = scored
    published, exported = (state_of(load_model(at)) for at in (root / "published", project.folder / "models/full"))
    assert published.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in published.items())


def test_the_edits_are_the_scripts_and_all_three_numbers_are_there(scored: tuple[Project, Path]) -> None:
    project, root = scored
    numbers = metrics(project)["full"]["box"]["exemplar"]
    assert {"clip_fid", "qs", "clip_score"} <= set(numbers) and numbers["clip_score"]["n"] == TAKEN
    assert metrics(project)["full"]["protocol"]["protocol"] == "upstream"
    units = json.loads((project.folder / "data/edit/full/manifest.json").read_text())["units"]
    files = [file["path"] for unit in units for file in unit["files"]]
    rows = [row for path in files for row in pq.read_table(project.folder / ".store" / path).to_pylist()]
    assert len(rows) == TAKEN
    name = rows[0]["bench_id"]
    photo, mask, reference = (
        images.decode((root / "test_bench" / part / f"{name}_{suffix}.png").read_bytes())
        for part, suffix in (("GT_3500", "GT"), ("Mask_bbox_3500", "mask"), ("Ref_3500", "ref"))
    )
    seed = int(row_rng(42, name, "edit").integers(2**62))
    [edit] = Editor.load(root / "published", device="cpu").edit(
        photo, mask[..., 0], reference, seed=seed, sampling=Sampling(5.0, 2), protocol=UPSTREAM
    )
    assert np.abs(images.decode(rows[0]["edit"]).astype(int) - edit).max() <= 1  # the batch's size decides last bits


@pytest.mark.drill  # three minutes more
def test_the_report_has_the_papers_table_and_no_published_number_beside_another_metric(
    scored: tuple[Project, Path],
) -> None:
    """30 photos are not COCO test2017, and this CLIP is not the paper's."""
    project, _ = scored
    project.run_to_the_end("dvc", "repro", "report")
    html = (project.folder / "reports" / "index.html").read_text()
    _, table = html.split("The paper's Table 1: COCOEE")
    assert "clip_fid is not the paper" in table and f"rows are of {TAKEN} items." in table
    assert "published</span>" not in table
