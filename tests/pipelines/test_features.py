"""What evaluation looks at and with which settings, refused before an extractor is opened."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pbe.config import load_params
from pbe.data import images
from pbe.store import Manifest
from pipelines import evaluate, features
from pipelines.runtime.stage import StageError


def test_links_to_photos_of_one_name_are_several_photos(tmp_path: Path) -> None:
    (tmp_path / "real_images").mkdir()
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photo|1.png").write_bytes(images.encode_png(np.zeros((8, 8, 3), np.uint8)))
        (tmp_path / "real_images" / f"{folder}.png").symlink_to(tmp_path / folder / "photo|1.png")
    cfg = load_params().evaluate.model_copy(update={"real_images": str(tmp_path / "real_images"), "real_images_px": 8})
    (look,) = features._extractions_of_real_images(cfg, "extractor", None)  # type: ignore[arg-type]
    views = [features._folder_crop(Path(path), cfg) for path, _, _ in look.photos]
    assert [view.key for view in views] == ["a.png", "b.png", "c.png"]


def test_an_entry_that_is_no_photo_is_named_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(images.encode_png(np.zeros((8, 8, 3), np.uint8)))
    os.mkfifo(tmp_path / "c.png")
    cfg = load_params().evaluate.model_copy(update={"real_images": str(tmp_path), "real_images_px": 8})
    with pytest.raises(StageError, match=r"evaluate\.real_images: .*/c\.png: pipes, devices or broken links"):
        features._extractions_of_real_images(cfg, "extractor", None)  # type: ignore[arg-type]


def edits(**config: object) -> Manifest:
    return Manifest("edit", "0", {"bench": "b", **config}, 1, (), {})


def test_edits_of_other_settings_are_not_scored() -> None:
    params = load_params()
    stage = SimpleNamespace(params=params)
    made = params.edit_variant("baseline").model_dump(mode="json")
    assert evaluate._differences(stage, edits(**made), "baseline") == ""  # type: ignore[arg-type]
    found = evaluate._differences(stage, edits(**made), "full")  # type: ignore[arg-type]
    assert found == f"guidance_scale 1.0, now {params.edit.guidance_scale}"
    found = evaluate._differences(stage, edits(holes=["box", "bezier"]), None)  # type: ignore[arg-type]
    assert found == "holes ['box', 'bezier'], now ['box']"


def test_a_bench_in_too_few_photos_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    import pyarrow as pa

    from pbe.evaluate.bench.heldout import choose
    from pipelines import bench

    boxes = pa.table({"image_id": ["a", "a", "b", "c"], "box_index": [0, 1, 0, 0], "label_name": ["cat"] * 4})
    with pytest.raises(StageError, match=r"4 items in 3 photos; an interval needs at least 4 photos\. Raise bench"):
        bench._refuse_too_few(choose(boxes, crops_per_box=1, max_items=10))


def test_stages_without_a_diffusion_network_import_neither_diffusers_nor_transformers() -> None:
    """Both together cost each process three seconds; evaluate, encode and bench start three processes each."""
    program = (
        "import sys, pipelines.bench, pipelines.encode, pipelines.evaluate, pbe.encode\n"
        "import pipelines.train, pbe.train.spec, pbe.diffusion.scheduler_config  # what starts a training\n"
        "from pbe.model.weight_store import open_backbone, open_codec\n"
        "print({'diffusers', 'transformers'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
