"""Profiles: laid over their base they are whole and valid, with comments; mistakes leave params.yaml alone."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from infra.memory import PAPER, architecture
from pbe.config import load_params, parse_params
from pbe.data.index import Selection, Selector
from pbe.data.schema import SPLITS
from pbe.errors import ParamsError
from pbe.model.unet import new_network
from pbe.places import repo_root
from pipelines.commands import params as params_command
from pipelines.commands import profile as command
from tests.profiles import FOLDER, NAMES, profile


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the profiles and a params.yaml, in place of the repository."""
    folder = tmp_path / "infra" / "profiles"
    folder.mkdir(parents=True)
    for path in FOLDER.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(command, "repo_root", lambda: tmp_path)
    return tmp_path


def _write(checkout: Path, name: str, text: str) -> None:
    (checkout / "infra" / "profiles" / f"{name}.yaml").write_text(text)


def test_the_sample_profile_is_params_yaml() -> None:
    assert (FOLDER / "sample.yaml").read_bytes() == (repo_root() / "params.yaml").read_bytes(), (
        "params.yaml as committed is the sample profile: cp params.yaml infra/profiles/sample.yaml"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_becomes_a_whole_valid_file(name: str, checkout: Path) -> None:
    needs_root = command.PLACEHOLDER in command.full_text(FOLDER, name)
    command.main(name, str(checkout) if needs_root else "")
    written = (checkout / "params.yaml").read_text()
    assert "full" in load_params(checkout / "params.yaml").variants
    assert command.PLACEHOLDER not in written and "\nbase:" not in written
    for key in ("${ingest.images}", "${ingest.boxes}", "${sweep.variant}"):  # dvc.yaml reads them from the file
        section, _, setting = key[2:-1].partition(".")
        assert f"\n{section}:" in written and f"\n  {setting}: " in written


def test_edits_of_params_yaml_are_kept_and_what_a_profile_wrote_is_not(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(checkout, "lost", "# of the user, broken\n\nbase: nowhere\n")
    params = checkout / "params.yaml"
    command.main("coco", str(checkout))  # it was "seed: 1"
    command.main("sample", "")
    own = params.read_text().replace("seed: 23 ", "seed: 24 ")
    params.write_text(own)
    command.main("tiny", "")
    kept = {path.name: path.read_text() for path in checkout.glob("params.*.yaml")}
    assert sorted(kept.values()) == sorted(["seed: 1\n", own])
    said = [line for line in capsys.readouterr().out.splitlines() if "with your edits" in line]
    assert sorted(line.split(":")[0] for line in said) == sorted(kept)


BASE = """\
# The base.

train:
  # which way
  codec: {kind: a, size: 1}      # the kind
  lr: 1                         # per step
  unet: {width: 3}              # wide
  mapper: {width: 5, blocks: 1} # both

variants:
  full: {}                      # all
  less: {}

baselines: {x: {kind: poisson}}
"""
OVERLAY = """\
# Laid over it.

base: under

train:
  lr: 2                         # per epoch
  steps: null                   # new
  codec: {kind: b, weights: "@ROOT@/w"}
  unet: {depth: 2}
  mapper:
    width: 6                    # wider

variants:
  full: {}
"""
WHOLE = """\
# Laid over it.

train:
  # which way
  codec: {kind: b, weights: "@ROOT@/w"} # the kind
  lr: 2                         # per epoch
  steps: null                   # new
  unet: {depth: 2, width: 3}    # wide
  mapper:
    width: 6                    # wider
    blocks: 1

variants:
  full: {}

baselines: {x: {kind: poisson}}
"""


def test_an_overlay_keeps_the_comments_of_its_base_merges_mappings_and_replaces_kinds_and_variants(
    tmp_path: Path,
) -> None:
    (tmp_path / "under.yaml").write_text(BASE)
    (tmp_path / "over.yaml").write_text(OVERLAY)
    assert command.full_text(tmp_path, "over") == WHOLE


def test_the_mini_profile_takes_500_photos_of_one_csv_half_of_them_for_the_bench() -> None:
    """From the validation CSV alone, whose photos val_frac deals to train and validation: none would be trained on."""
    cfg = profile("openimages-mini")
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
    ("train.hole_probs.bezier", 0.5, "configs/v1.yaml"),
    ("train.condition_dropout_prob", 0.2, "configs/v1.yaml"),
    ("train.context_dropout_prob", 0.0, "has none"),
    ("edit.guidance_scale", 5.0, "README.md"),
    ("edit.steps", 50, "scripts/inference_test_bench.py"),
]


@pytest.mark.parametrize("name", ["openimages", "openimages-8gpu"])
def test_the_papers_profiles_have_upstreams_values(name: str) -> None:
    params = profile(name)
    for key, value, where in UPSTREAM:
        got: object = params
        for part in key.split("."):
            got = getattr(got, part)
        assert got == value, f"{name}: {key} is {got}, upstream's is {value} ({where})"
    assert params.train.accumulation_steps * params.train.workers * params.train.micro_batch == params.train.batch
    epochs = params.train.steps * params.train.batch / 1_743_042
    assert 39.99 < epochs <= 40


def test_the_rows_of_table_3_that_openimages_has_as_a_comment_are_valid() -> None:
    text = (FOLDER / "openimages.yaml").read_text()
    rows = "".join(f"{line[2:]}\n" for line in text.splitlines() if line.startswith("#   "))
    raw = profile("openimages").model_dump(mode="json")
    raw["variants"] |= yaml.safe_load(rows)
    params = parse_params(yaml.safe_dump(raw, sort_keys=False), "params.yaml")
    assert list(params.variants) == ["full", "bottleneck", "augmentation", "prior", "baseline"]
    assert [params.train_variant(name).init for name in params.variants] == ["sd"] * 4 + ["random"]


def test_the_papers_profiles_build_the_papers_network() -> None:
    """Parameter counts of upstream's configs/v1.yaml."""
    assert architecture(profile("openimages").train) == PAPER
    with torch.device("meta"):
        network = new_network(PAPER)
    assert sum(p.numel() for p in network.unet.parameters()) == 859_535_364
    assert sum(p.numel() for p in network.parameters()) == 923_306_500


def test_root_becomes_absolute_whatever_its_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = checkout / 'my "photos": # 1 \\ of 2'
    photos.mkdir()
    monkeypatch.chdir(checkout)
    command.main("coco", photos.name)
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
        ("batch", "", r"params\.yaml: train: streams 2 must divide batch 7"),
        ("typo", "", r"infra/profiles/typo\.yaml: trian: not a section of its base"),
        ("lost", "", r"profile 'nowhere' is unknown"),
        ("circle", "", r"infra/profiles/circle\.yaml: base: circle is its own base"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(name: str, root: str, message: str, checkout: Path) -> None:
    if root or name != "imagenet":
        _write(checkout, "batch", "# x\n\nbase: tiny\n\ntrain:\n  batch: 7\n")
        _write(checkout, "typo", "# x\n\nbase: tiny\n\ntrian:\n  batch: 8\n")
        _write(checkout, "lost", "# x\n\nbase: nowhere\n")
        _write(checkout, "circle", "# x\n\nbase: circle\n")
    with pytest.raises(ParamsError, match=message):
        command.main(name, root)
    assert sorted(path.name for path in checkout.iterdir()) == ["infra", "params.yaml"]
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"


def test_the_ablation_trains_nothing_again_that_scratch_has_trained() -> None:
    scratch, ablation = profile("scratch"), profile("ablation")
    assert list(scratch.variants) == ["full", "baseline", "untrained"] and len(ablation.variants) == 6
    assert scratch.variants.items() < ablation.variants.items()
    for section in ("seed", "ingest", "filter", "materialize", "encode", "train", "bench"):
        assert getattr(scratch, section) == getattr(ablation, section)


def test_params_shows_every_setting_with_its_source_and_what_differs_from_a_profile(
    capsys: pytest.CaptureFixture[str],
) -> None:
    params_command.main()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["train.lr"].split(None, 1) == [
        "0.0007",
        "# AdamW's learning rate. Upstream: 1e-5; ours is small",
    ]
    assert lines["train.adam_eps"].split(None, 1) == [
        "1.0e-08",
        "# (default) AdamW's epsilon. Upstream (torch's default)",
    ]
    assert lines["encode.codec"].startswith("{kind: pretrained, weights: ") and "AutoencoderKL" in lines["encode.codec"]
    assert lines["variants.before"] == "{train: {steps: 0}}         # the model as it comes"
    params_command.main("tiny")
    out = capsys.readouterr().out
    assert "train.steps: 130; tiny: 12\n" in out and "variants.before: {" in out and "train.seed" not in out
    params_command.main("sample")
    assert capsys.readouterr().out == f"0 of {len(lines)} settings differ from profile sample\n"
