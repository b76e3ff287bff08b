"""What evaluation looks at and with which settings, refused before an extractor is opened."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pbe.config import load_params
from pbe.data import images
from pbe.data.masks import pack_mask
from pbe.data.schema import BENCH, EDITS, REAL_IMAGES
from pbe.evaluate.features.weights import Entry, store_extractor
from pbe.evaluate.settings import EfficientNetExtractorConfig
from pbe.store import Manifest, Store
from pipelines import evaluate, features
from pipelines.runtime.parts import Unit
from pipelines.runtime.stage import StageError
from tests.profiles import profile


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


def test_extractions_of_one_file_share_its_pictures_and_write_what_each_writes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the sample extra")
    rng = np.random.default_rng(0)

    def picture(side_px: int) -> bytes:
        return images.encode_png(rng.integers(0, 256, (side_px, side_px, 3)).astype(np.uint8))

    hole_mask = np.zeros((24, 24), np.uint8)
    hole_mask[4:16, 6:20] = 1
    words = {"label_name": "cat", "exemplar_image_id": "p", "exemplar_same_class": True}
    masks = {"box_hole_mask": pack_mask(hole_mask), "bezier_hole_mask": None}
    items = [
        {"bench_id": f"b{i}", "image_id": f"p{i}", "source": picture(24), **words, **masks}
        | {kind: picture(32) for kind in ("exemplar", "own", "foreign")}
        for i in range(3)
    ]
    keys = {"hole_kind": "box", "reference_kind": "exemplar", "seed": 1}
    rows = [{"bench_id": item["bench_id"], **keys, "edit": picture(24)} for item in items]
    real = [{"real_id": f"r{i}", "picture": picture(24)} for i in range(2)]
    store = Store(str(tmp_path))
    tables = {"bench": (items, BENCH), "edits": (rows, EDITS), "real_images": (real, REAL_IMAGES)}
    files = {
        name: store.write_unit("in", name, {name: pa.Table.from_pylist(made, schema=schema)}, counts={}).files[0]
        for name, (made, schema) in tables.items()
    }
    known = load_params().evaluate
    networks = [EfficientNetExtractorConfig(kind=kind) for kind in ("efficientnet_lite0", "efficientnet_lite2")]
    cfg = known.model_copy(update={"extractors": networks, "batch_rows": 2})
    entries: dict[str, Entry] = {network.kind: store_extractor(store, network) for network in networks}
    work = features._worker(store, cfg, entries, None, files["bench"], [("box", "exemplar"), ("box", "own")])
    decoded: list[bytes] = []
    decode = images.decode

    def noted(data: bytes) -> np.ndarray:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(images, "decode", noted)
    for what, file in files.items():
        names = [*entries, features.PIXEL_COUNTS] if what == "edits" else [*entries]
        ats = [features.Extraction(name, what, file) for name in names]
        decoded.clear()
        together = work([Unit(f"{at.extractor}-{what}", "together", at) for at in ats])
        assert len(decoded) == len(set(decoded))
        for at, record in zip(ats, together, strict=True):
            [alone] = work([Unit(f"{at.extractor}-{what}", "alone", at)])
            assert record.files[0].sha256 == alone.files[0].sha256 and record.counts == alone.counts


def edits(**config: object) -> Manifest:
    return Manifest("edit", "0", {"bench": "b", **config}, 1, (), {})


def test_edits_of_other_settings_are_not_scored() -> None:
    params = profile("scratch")
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


def test_actors_that_extract_features_do_not_import_what_only_fits_mixtures() -> None:
    """scikit-learn and scipy.stats take as long to import as torch."""
    program = "import sys, pipelines.features\nprint({'sklearn', 'scipy.stats'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


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


def test_what_starts_a_fine_tuning_imports_neither(tmp_path: Path) -> None:
    """Of a model with a patch codec and EfficientNet: 8 seconds of `encode`, and of a training that had finished."""
    program = f"""
import sys
from types import SimpleNamespace
from pbe.config import load_params
from pbe.places import repo_root
from pbe.store import Store
from pipelines import encode
from pipelines.runtime.stage import Stage
from pipelines.train_weights import starting_point

stage = Stage("train", "full", load_params(), Store({str(tmp_path)!r}), repo_root())
cfg = stage.params.train_variant("full")
assert cfg.init == "models/pretrained/small"
codec, _ = encode._codec_entry(stage, None), encode._backbone_entry(stage)
start = starting_point(stage, cfg, SimpleNamespace(config={{"codec": codec}}))
assert start.guidance_scale == 3
print({{"diffusers", "transformers"}} & sys.modules.keys())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.endswith("\nset()\n"), run.stdout + run.stderr
