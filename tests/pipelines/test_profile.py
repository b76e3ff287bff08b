"""Profiles: every one is valid, the placeholder becomes the absolute folder, and mistakes leave params.yaml alone."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from infra.cost import PAPER, architecture
from pbe.config import ParamsError, load_params
from pbe.data.index import Selection, Selector
from pbe.data.schema import SPLITS
from pbe.model.unet import new_network
from pipelines.commands import profile

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = REPOSITORY / "infra" / "profiles"
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the profiles and a params.yaml, in place of the repository."""
    folder = tmp_path / "infra" / "profiles"
    folder.mkdir(parents=True)
    for path in PROFILES.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(profile, "repo_root", lambda: tmp_path)
    return tmp_path


def test_the_sample_profile_is_params_yaml() -> None:
    assert (PROFILES / "sample.yaml").read_bytes() == (REPOSITORY / "params.yaml").read_bytes(), (
        "params.yaml as committed is the sample profile: cp params.yaml infra/profiles/sample.yaml"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_valid(name: str, checkout: Path) -> None:
    needs_root = profile.PLACEHOLDER in (PROFILES / f"{name}.yaml").read_text()
    profile.main(name, str(checkout) if needs_root else "")
    assert "full" in load_params(checkout / "params.yaml").variants
    assert profile.PLACEHOLDER not in (checkout / "params.yaml").read_text()


def test_the_mini_profile_takes_500_photos_of_one_csv_half_of_them_for_the_bench() -> None:
    """From the validation CSV alone, whose photos val_frac deals to train and validation: none would be trained on."""
    cfg = load_params(PROFILES / "openimages-mini.yaml")
    chosen = Selection(cfg.ingest.splits, cfg.ingest.limit, cfg.ingest.classes, None, cfg.ingest.val_frac)
    ids = [f"{number:016x}" for number in range(5_000) for _ in range(3)]  # three boxes each
    lines = pa.table(
        {
            "image_id": ids,
            "split": pa.array([SPLITS.index("validation")] * len(ids), pa.int8()),
            "label": ["/m/1"] * len(ids),
            "reason": pa.nulls(len(ids), pa.string()),
        }
    )
    taken = Selector(chosen, class_ids=None)(lines)
    photos = {(SPLITS[row["split"]], row["image_id"]) for row in taken.to_pylist()}
    assert Counter(split for split, _ in photos) == {"train": 250, "validation": 250}
    assert len({image_id for _, image_id in photos}) == 500 and taken.num_rows == 1_500
    assert cfg.bench.split == "validation"


def test_the_mini_profile_trains_and_edits_as_coco_does() -> None:
    mini, coco = (yaml.safe_load((PROFILES / f"{name}.yaml").read_text()) for name in ("openimages-mini", "coco"))
    assert {stage for stage in coco if mini[stage] != coco[stage]} == {"ingest", "materialize"}
    assert {key for key in coco["materialize"] if mini["materialize"][key] != coco["materialize"][key]} == {"slots"}


# (setting, value, where upstream has it)
UPSTREAM = [
    ("materialize.image_px", 512, "configs/v1.yaml"),
    ("materialize.reference_px", 224, "ldm/data/open-images.py"),
    ("train.init", "sd", "scripts/modify_checkpoints.py"),
    ("train.batch", 256, "configs/v1.yaml: 4 per GPU; the paper: 64 GPUs"),
    ("train.lr", 1e-5, "configs/v1.yaml, --scale_lr False"),
    ("train.warmup_steps", 10_000, "configs/v1.yaml"),
    ("train.final_lr_frac", 1.0, "configs/v1.yaml"),
    ("train.weight_decay", 0.01, "torch's default"),
    ("train.adam_betas", (0.9, 0.999), "torch's default"),
    ("train.adam_eps", 1e-8, "torch's default"),
    ("train.grad_clip", None, "configs/v1.yaml"),
    ("train.objective", "eps", "configs/v1.yaml"),
    ("train.beta_schedule", "scaled_linear", "configs/v1.yaml"),
    ("train.bezier_prob", 0.5, "configs/v1.yaml"),
    ("train.condition_dropout_prob", 0.2, "configs/v1.yaml"),
    ("train.context_dropout_prob", 0.0, "has none"),
    ("edit.guidance_scale", 5.0, "README.md"),
    ("edit.steps", 50, "scripts/inference_test_bench.py"),
]


@pytest.mark.parametrize("name", ["openimages", "openimages-8gpu"])
def test_the_papers_profiles_have_upstreams_values(name: str) -> None:
    params = load_params(PROFILES / f"{name}.yaml")
    for key, value, where in UPSTREAM:
        got: object = params
        for part in key.split("."):
            got = getattr(got, part)
        assert got == value, f"{name}: {key} is {got}, upstream's is {value} ({where})"
    assert params.train.accumulation_steps * params.train.workers * params.train.micro_batch == params.train.batch
    epochs = params.train.steps * params.train.batch / 1_743_042
    assert 39.99 < epochs <= 40


def test_the_papers_profiles_build_the_papers_network() -> None:
    """Parameter counts of upstream's configs/v1.yaml."""
    train = load_params(PROFILES / "openimages.yaml").train
    assert architecture(train) == PAPER
    with torch.device("meta"):
        network = new_network(PAPER)
    assert sum(p.numel() for p in network.unet.parameters()) == 859_535_364
    assert sum(p.numel() for p in network.parameters()) == 923_306_500


def test_one_node_trains_as_64_gpus_do_but_for_how_it_is_run() -> None:
    """So their results can be compared."""
    big, small = (yaml.safe_load((PROFILES / f"{name}.yaml").read_text()) for name in ("openimages", "openimages-8gpu"))
    differ = {
        f"{stage}.{key}"
        for stage in big.keys() - {"seed"}
        for key in big[stage]
        if big[stage][key] != small[stage][key]
    }
    assert differ == {
        "encode.actors",
        "train.workers",
        "train.per_worker",
        "train.micro_batch",
        "train.zero_stage",
        "train.precision",
        "edit.actors",
        "evaluate.actors",
    }
    assert big.keys() == small.keys() and big["seed"] == small["seed"]


def test_root_becomes_absolute_whatever_its_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = checkout / 'my "photos": # 1 \\ of 2'
    photos.mkdir()
    monkeypatch.chdir(checkout)
    profile.main("coco", photos.name)
    params = load_params(checkout / "params.yaml")
    assert (params.ingest.images, params.ingest.boxes) == (f"{photos}/images", str(photos))
    assert params.bench.split == "validation"


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("imagenet", "", f"'imagenet' is unknown; there are: {', '.join(NAMES)}"),
        ("../profiles/coco", "/", "is unknown"),
        ("coco", "", "make profile P=coco ROOT="),
        ("coco", "/nowhere/at/all", "is not a folder"),
        ("sample", "/", "takes no ROOT"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(name: str, root: str, message: str, checkout: Path) -> None:
    with pytest.raises(ParamsError, match=message):
        profile.main(name, root)
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"


def test_an_invalid_profile_does_not_replace_params(checkout: Path) -> None:
    raw = yaml.safe_load((PROFILES / "tiny.yaml").read_text())
    raw["train"]["batch"] = 7
    (checkout / "infra" / "profiles" / "bad.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match="lanes 2 must divide batch 7"):
        profile.main("bad", "")
    assert sorted(path.name for path in checkout.iterdir()) == ["infra", "params.yaml"]
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"
