"""LoRA beside published weights on own photos, from the checkpoint's file to an adapter that merges: profile
finetune-8gb, its sizes made tiny. Arithmetic and settings are the profile's; the weights are random."""

from pathlib import Path

import pytest
import torch

from pbe.import_weights import import_weights
from pbe.model.adapter import read_adapter
from pbe.model.weights import load_model
from tests.ldm_layout import ldm_model, paint_by_example, sizes_of
from tests.pipelines.project import Project, make_project
from tests.retrieve.conftest import write_boxes, write_photo
from tests.tiny_weights import state_of

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(1200)]  # four minutes

PHOTOS = 12


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    root = tmp_path_factory.mktemp("own photos")
    torch.save({"state_dict": paint_by_example(ldm_model())}, root / "model.ckpt")
    for folder in ("images", "boxes"):
        (root / folder).mkdir()
    for number in range(PHOTOS):
        write_photo(root / "images", number)
    write_boxes(root / "boxes" / "boxes.csv", PHOTOS)
    project = make_project(tmp_path_factory.mktemp("chain") / "finetune", "finetune-8gb", str(root))
    project.run("pbe.cli", "import", str(root / "model.ckpt"), "--out", str(root / "published"))
    here = {"cpus": 1, "gpus": 0, "memory_gib": 1}
    project.set_params(
        filter__min_side_px=1,
        materialize__slots=1,
        encode__per_actor=here,
        encode__rows_per_group=1,
        train__per_worker=here,
        train__steps=4,
        train__batch=4,
        train__streams=2,
        train__micro_batch=2,
        train__validate_every=2,
        train__validation_rows=2,
        train__grid_rows=2,
        **sizes_of(ldm_model()),
    )
    project.run_to_the_end("dvc", "repro", "train@full", "train@before")
    return project, root


def test_what_was_learned_is_an_adapter_that_merges_into_the_published_weights(
    finetuned: tuple[Project, Path], tmp_path: Path
) -> None:
    project, root = finetuned
    exported, published = project.folder / "models" / "full", root / "published"
    assert read_adapter(exported / "adapter").lora.rank == 16
    import_weights(exported / "adapter", tmp_path / "merged", base=published)
    merged, whole, before = (state_of(load_model(folder)) for folder in (tmp_path / "merged", exported, published))
    assert merged.keys() == whole.keys() == before.keys()
    assert all(torch.equal(value, whole[name]) for name, value in merged.items())
    moved = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("network.exemplar.") for name in moved)
    assert {name.split(".")[-2] for name in moved if ".unet." in name} <= {"to_q", "to_k", "to_v", "0"}  # to_out.0


def test_beside_it_stand_the_published_weights_as_they_are(finetuned: tuple[Project, Path]) -> None:
    project, root = finetuned
    before, published = (state_of(load_model(at)) for at in (project.folder / "models/before", root / "published"))
    assert all(torch.equal(value, before[name]) for name, value in published.items())
