"""params.yaml: the committed file is good; any wrong key is one line with file, key, value and what is allowed."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pbe.config import Params, VariantEdit, load_params
from pbe.data.settings import DownloadConfig
from pbe.errors import ParamsError, UserError
from pbe.model.settings import UNetConfig
from pbe.places import repo_root, storage_uri, tracking_uri
from pbe.train.settings import TrainConfig

TEXT: dict[str, Any] = {"condition": "text", "unet": {"class_embedding": False}}
COMMITTED: dict[str, Any] = yaml.safe_load((repo_root() / "params.yaml").read_text())
# what the messages below mention, so that another profile in params.yaml changes nothing here
KNOWN: dict[str, dict[str, Any]] = {
    "ingest": {
        "source": "sample",
        "images": "photos.csv",
        "boxes": "boxes.csv",
        "image_base": None,
        "splits": ["train", "validation", "test"],
        "val_frac": 0,
    },
    "filter": {"min_area_frac": 0.02, "max_area_frac": 0.8},
    "materialize": {"image_px": 64},
    "encode": {
        "codec": {"kind": "patch", "patch_px": 4, "channels": 16, "fit_crops": 32},
        "backbone": {"kind": "efficientnet_lite0", "tokens": "class"},
    },
    "train": {
        "init": "random",
        "batch": 32,
        "streams": 2,
        "workers": 2,
        "micro_batch": 16,
        "unet": {
            "block_channels": [48, 96],
            "attention": [False, True],
            "layers_per_block": 1,
            "attention_heads": 2,
            "norm_groups": 16,
            "context_width": 128,
            "class_embedding": True,
        },
        "exemplar": {"tokens": "class", "mapper_width": 256, "mapper_blocks": 1},
    },
}
Load = Callable[..., Params]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load({"train.lr": 1}): a good params.yaml with these keys set; a value of `...` removes the key."""

    def _load(changes: dict[str, Any]) -> Params:
        raw = copy.deepcopy(COMMITTED)
        for section, values in KNOWN.items():
            raw[section].update(copy.deepcopy(values))
        raw["ingest"]["download"] = {}
        raw["variants"] = {"full": {"train": {}, "edit": {}}}
        for path, value in changes.items():
            *parents, key = path.split(".")
            node = raw
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is ...:
                del node[key]
            else:
                node[key] = value
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_params(file)

    return _load


def _message(load: Load, changes: dict[str, Any]) -> str:
    with pytest.raises(ParamsError) as caught:
        load(changes)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def test_the_committed_file_is_valid_and_short() -> None:
    params = load_params()
    for name in params.variants:
        params.train_variant(name)
    assert len((repo_root() / "params.yaml").read_text().splitlines()) < 100


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if nested and not field.description and not name.startswith("per_"):
            assert isinstance(field.annotation, type)
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def test_a_setting_is_in_params_yaml_or_has_its_default_unit_and_source_in_its_model() -> None:
    """params.yaml repeats no default, but may have another value; the models of kinds are not checked."""
    for key, field in _fields(Params):
        node: Any = COMMITTED
        for part in key.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if field.is_required():
            assert node != {} or key.startswith("variants"), f"{key} has no default: params.yaml must have it"
        elif not key.startswith("variants"):
            assert field.description, f"{key}: what it means, its unit and its source"
            default = field.get_default(call_default_factory=True)
            assert node == {} or node != (list(default) if isinstance(default, tuple) else default), (
                f"{key} is the default of the model: leave it out of params.yaml"
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [  # one case for each kind of error and each kind of key
        ({"train.lr": -1}, "params.yaml: train.lr = -1: input should be greater than 0"),
        ({"train.steps": True}, "params.yaml: train.steps = True: input should be a number"),
        ({"train.lr": float("nan")}, "params.yaml: train.lr = nan: "),
        (
            {"train.trainable": "lora"},
            "params.yaml: train.trainable: 'lora': allowed are all, cross_attention and {lora: {rank: 4}}",
        ),
        (
            {"train.trainable": {"lora": {"rank": 0}}},
            "params.yaml: train.trainable.lora.rank = 0: input should be greater than or equal to 1",
        ),
        (
            {"train.trainable": {"lora": {"ranks": 4}}},
            "params.yaml: train.trainable.lora.ranks = 4: unknown key; allowed here: alpha, rank, targets",
        ),
        ({"edit.seeds": [True]}, "params.yaml: edit.seeds.0 = True: input should be a number"),
        (
            {"ingest.source": "web"},
            "params.yaml: ingest.source = 'web': input should be 'sample', 'folder', 'openimages' or 'pairs'",
        ),
        (
            {"train.kernels.activation_checkpointing": True},
            "params.yaml: train.kernels: activation_checkpointing: is now checkpointed_levels, which counts the UNet's "
            "levels that recompute; write checkpointed_levels: 4",
        ),
        (
            {"train.bezier_prob": 0.3},
            "params.yaml: train: bezier_prob: is now hole_probs, which names every kind of hole; write hole_probs: ",
        ),
        ({"ingest.splits": ["val"]}, "params.yaml: ingest.splits.0 = 'val': input should be 'train', 'validation' or"),
        ({"train": 3}, "params.yaml: train = 3: input should be a valid dictionary or instance of TrainConfig"),
        (
            {"evaluate.extractors": [{"kind": "resnet"}]},
            "params.yaml: evaluate.extractors.0.kind = 'resnet': allowed are efficientnet_lite0, efficientnet_lite2",
        ),
        (
            {"evaluate.extractors": ["clip"]},
            "params.yaml: evaluate.extractors.0.kind = 'clip': allowed are efficientnet_lite0",
        ),
        (
            {"evaluate.extractors": [{"kind": "clip", "weights": "w", "mixtur": None}]},
            "params.yaml: evaluate.extractors.0.mixture: required key is missing\n"
            "params.yaml: evaluate.extractors.0.mixtur = None: unknown key; allowed here: kind, mixture, weights",
        ),
        (
            {"baselines": {"mine": {"kind": "other"}}},
            "params.yaml: baselines.mine.kind = 'other': allowed are hole_kept",
        ),
        ({"baselines": {"mine": {"kind": "folder"}}}, "params.yaml: baselines.mine.folder: required key is missing"),
        ({"train.lr": ...}, "params.yaml: train.lr: required key is missing"),
        ({"train": ...}, "params.yaml: train: required key is missing"),
        ({"variants": {"Bad-Name": {}}}, "params.yaml: variants.Bad-Name.[key] = 'Bad-Name': string should match"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line_with_file_key_value_and_what_is_allowed(
    changes: dict[str, Any], message: str, load: Load
) -> None:
    got = _message(load, changes)
    assert got.startswith(message) and got.count("\n") == message.count("\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"filter.min_area_frac": 0.9},
            "params.yaml: filter: min_area_frac 0.9 must be below max_area_frac 0.8",
        ),
        ({"train.workers": 3}, "params.yaml: train: workers 3 must divide streams 2"),
        (
            {"train.trainable": {"lora": {}}},
            "params.yaml: train: trainable lora freezes the rest of the UNet, and init random would freeze noise",
        ),
        (
            {"train.init": "models/full"},
            "params.yaml: train.init = models/full: training the variant 'full' replaces models/full; rename the",
        ),
        (
            {"variants.other": {"train": {"init": "./models/other/adapter/"}}},
            "params.yaml: train.init = ./models/other/adapter/: training the variant 'other' replaces models/other",
        ),
        (
            {"encode.codec": {"kind": "pretrained", "weights": "models/full"}},
            "params.yaml: encode.codec.weights = models/full: training the variant 'full' replaces models/full",
        ),
        (
            {"variants.pretrained": {}},
            "params.yaml: params: 'pretrained' is a reserved name (models/pretrained is in git)",
        ),
        ({"train.batch": 33}, "params.yaml: train: streams 2 must divide batch 33"),
        (
            {"train.micro_batch": 5},
            "params.yaml: train: micro_batch 5 must divide the rows per worker, batch / workers = 16",
        ),
        (
            {"train.unet.block_channels": [48, 50]},
            "params.yaml: train.unet: block_channels: 50 must be divisible by norm_groups (16) and attention_heads (2)",
        ),
        ({"encode.codec.channels": 49}, "params.yaml: encode.codec: channels 49 exceeds 3 * patch_px^2 = 48"),
        ({"encode.codec.kind": "vq"}, "params.yaml: encode.codec.kind = 'vq': allowed are patch, pretrained"),
        ({"encode.codec.kind": ...}, "params.yaml: encode.codec.kind = None: allowed are patch, pretrained"),
        ({"encode.codec": "patch"}, "params.yaml: encode.codec.kind = 'patch': allowed are patch, pretrained"),
        (
            {"encode.codec.pach_px": 4},
            "params.yaml: encode.codec.pach_px = 4: unknown key; allowed here: channels, fit_crops, kind, patch_px",
        ),
        ({"encode.codec.patch_px": 0}, "params.yaml: encode.codec.patch_px = 0: input should be greater than"),
        ({"encode.backbone.kind": "clip"}, "params.yaml: encode.backbone.weights: required key is missing"),
        ({"train.exemplar.tokens": "all"}, "params.yaml: variants.full: train.exemplar.tokens = 'all' needs encode."),
        (
            {"train.perceptual_weight": 3.0, "train.objective": "eps"},
            "params.yaml: train: perceptual_weight needs the photo that a prediction implies, and with objective",
        ),
        ({"train.condition": "text"}, "params.yaml: train: unet.class_embedding reads one token, and the first of a"),
        (
            {"train.condition": "text", "train.unet.class_embedding": False},
            "params.yaml: variants.full: has train.condition: text, but is the first, which all others are compared",
        ),
        (
            {"variants.text": {"train": {**TEXT, "input": "pixels"}}},
            "params.yaml: variants.text.train: input pixels draws fresh references, which condition text does not read",
        ),
        (
            {"variants.text": {"train": {**TEXT, "exemplar": {"mapper_blocks": 2}}}},
            "params.yaml: variants.text.train.exemplar: of exemplars, which a variant with train.condition: text does",
        ),
        (
            {"variants.text": {"train": TEXT}, "sweep.variant": "text"},
            "params.yaml: variants.text: has train.condition: text, but is sweep.variant; that must be one of",
        ),
        (
            {"edit.captions": ["label", "label"]},
            "params.yaml: edit: captions: ['label', 'label'] contains duplicates",
        ),
        (
            {
                "materialize.image_px": 72,
                "train.unet.block_channels": [48, 96, 96],
                "train.unet.attention": [False, False, True],
            },
            "params.yaml: variants.full: latents of 18 px (materialize.image_px / encode.codec.patch_px)",
        ),
        (
            {"encode.codec.patch_px": 5},
            "params.yaml: params: encode.codec.patch_px 5 must divide materialize.image_px 64",
        ),
        (
            {"ingest.source": "openimages"},
            "params.yaml: ingest: image_base: source 'openimages' needs the address of the images",
        ),
        (
            {"ingest.image_base": "s3://open-images-dataset"},
            "params.yaml: ingest: image_base: must be null with source 'sample'; its photos are at ingest.images",
        ),
        (
            {"ingest.source": "folder", "ingest.image_base": "http://mirror.example"},
            "params.yaml: ingest: image_base: must be null with source 'folder'",
        ),
        (
            {"ingest.source": "openimages", "ingest.image_base": "/photos"},
            "params.yaml: ingest: image_base: /photos must begin with s3://, https:// or http://",
        ),
        ({"ingest.images": "boxes.csv"}, "params.yaml: ingest: images and boxes must differ"),
        (
            {"bench.source": "cocoee"},
            "params.yaml: bench: cocoee: source 'cocoee' needs the folder of the unpacked archive",
        ),
        ({"evaluate.real_images": "photos"}, "params.yaml: evaluate: real_images and real_images_px go together"),
        ({"baselines": {"full": {"kind": "poisson"}}}, "params.yaml: params: full is both a variant and a baseline"),
        (
            {"baselines": {"card": {"kind": "poisson"}}},
            "params.yaml: params: 'card' is a reserved name",
        ),
        (
            {"baselines": {"theirs": {"kind": "folder", "folder": "x"}}, "edit.holes": ["bezier", "box"]},
            "params.yaml: params: edit.holes ['bezier', 'box']: baselines.theirs is a folder of results",
        ),
        ({"evaluate.statistics": {"seed": 2**32}}, "params.yaml: evaluate.statistics.seed = 4294967296"),
        ({"variants.full.train": {"workers": 3}}, "params.yaml: variants.full.train: workers 3 must divide streams 2"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_one_another_are_one_line_with_their_values(
    changes: dict[str, Any], message: str, load: Load
) -> None:
    got = _message(load, changes)
    assert got.startswith(message) and "\n" not in got


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("leraning_rate", Params),
        ("train.lrr", TrainConfig),
        ("ingest.download.retries", DownloadConfig),
        ("variants.full.train.lrr", TrainConfig),
        ("variants.full.edit.steps", VariantEdit),
    ],
)
def test_an_unknown_key_names_the_keys_that_its_place_allows(path: str, model: type[BaseModel], load: Load) -> None:
    allowed = ", ".join(sorted(model.model_fields))
    assert _message(load, {path: 1}) == f"params.yaml: {path} = 1: unknown key; allowed here: {allowed}"


def test_a_variants_nested_key_is_checked_like_any_other(load: Load) -> None:
    allowed = ", ".join(sorted(UNetConfig.model_fields))
    got = _message(load, {"variants": {"full": {}, "wide": {"train": {"unet": {"heads": 1}}}}})
    assert got == f"params.yaml: variants.wide.train.unet.heads = 1: unknown key; allowed here: {allowed}"
    got = _message(load, {"variants": {"full": {}, "fast": {"train": {"lr": -1}}}})
    assert got == "params.yaml: variants.fast.train.lr = -1: input should be greater than 0"


def test_every_wrong_key_has_its_own_line(load: Load) -> None:
    lines = _message(load, {"train.lr": -1, "filter.min_area_frac": 2, "typo": 1, "seed": ...}).split("\n")
    assert sorted(line.split(" ")[1].rstrip(":") for line in lines) == [
        "filter.min_area_frac",
        "seed",
        "train.lr",
        "typo",
    ]


def test_numbers_as_the_command_line_writes_them_are_numbers(load: Load) -> None:
    """`2e-5` is a text in YAML 1.1."""
    assert load({"train.lr": "2e-5"}).train.lr == 2e-5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "must be a mapping"),
        (b"- 1\n- 2\n", "must be a mapping"),
        (b"train: [1, 2", "not valid YAML"),
        (b"train: {\n  lr: }: 3\n", "not valid YAML"),
        (b"seed: \xff", "not valid YAML"),
        (b"seed: 1\ningest:\n  limit: {{LIMIT}}\n", "not valid YAML: a key must be a plain word"),
        (b"seed: 1\ntrain:\n  lr: 1\n  lr: 2\n", "not valid YAML: duplicate key 'lr'"),
    ],
    ids=str,
)
def test_a_file_that_is_no_settings_is_one_line(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(data)
    with pytest.raises(ParamsError, match=f"^params.yaml: {words}") as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"^params\.yaml: not found; `make profile P=sample` writes it$"):
        load_params(tmp_path / "params.yaml")


def test_variants_override_their_keys_and_nothing_else(load: Load) -> None:
    params = load({"variants": {"full": {}, "wide": {"train": {"lr": 0.5, "unet": {"context_width": 64}}}}})
    assert params.train_variant("full") == params.train
    wide, base = params.train_variant("wide").model_dump(), params.train.model_dump()
    assert (wide.pop("lr"), wide["unet"].pop("context_width")) == (0.5, 64)
    base.pop("lr"), base["unet"].pop("context_width")
    assert wide == base
    with pytest.raises(ParamsError, match=r"^variant 'other' is not in params\.yaml; it names: full, wide$"):
        params.train_variant("other")


def test_a_setting_that_has_its_default_names_no_part(load: Load) -> None:
    """So a new one renames nothing, in a variant either."""
    params = load({"filter.max_iou": 0.9, "variants": {"full": {"train": {"exemplar": {"tokens": "class"}}}}})
    assert params.filter.identity() == {"min_area_frac": 0.02, "max_area_frac": 0.8, "max_iou": 0.9}
    assert params.filter.identity(without={"max_iou"}) == load({}).filter.identity()
    assert params.train_variant("full").identity() == load({}).train_variant("full").identity()


def test_settings_cannot_be_changed_after_reading(load: Load) -> None:
    params = load({})
    with pytest.raises(ValidationError, match="frozen"):
        params.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(("workers", "micro"), [(1, 32), (1, 8), (2, 16), (2, 1)])
def test_accumulation_keeps_the_global_batch(workers: int, micro: int, load: Load) -> None:
    train = load({"train.workers": workers, "train.micro_batch": micro}).train
    assert train.accumulation_steps * workers * micro == 32


def test_storage_is_an_absolute_path_or_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PBE_STORAGE", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert storage_uri() == str(repo_root() / ".store")
    assert tracking_uri() == f"sqlite:///{repo_root() / 'mlflow.db'}"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # DVC's queued experiments share the parent's storage
    assert storage_uri() == str(tmp_path / ".store")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, expected in (
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        (str(tmp_path / "x" / ".." / "y"), str(tmp_path / "y")),
        ("shared", str(tmp_path / "shared")),
        ("~/data", str(tmp_path / "home" / "data")),
    ):
        monkeypatch.setenv("PBE_STORAGE", value)
        assert storage_uri() == expected
    monkeypatch.setenv("PBE_STORAGE", "gs://bucket")
    with pytest.raises(ParamsError, match=r"^PBE_STORAGE=gs://bucket: use a local path or s3://bucket/prefix$"):
        storage_uri()
    for value in ("s3://", "s3:///", "~nobody-of-this-name/x"):
        monkeypatch.setenv("PBE_STORAGE", value)
        with pytest.raises(ParamsError, match=f"^PBE_STORAGE={value}: "):
            storage_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri() == "http://tracking:5000"


def test_addresses_hold_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBE_STORAGE", "s3://KEY:hunter2@bucket/prefix")
    with pytest.raises(ParamsError, match=r"^PBE_STORAGE holds a password or a token") as error:
        storage_uri()
    assert "hunter2" not in str(error.value)
    for value in (
        "http://me:hunter2@tracking:5000",
        "postgresql://me:hunter2@db/mlflow",
        "http://t:5000?token=hunter2",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        with pytest.raises(ParamsError, match=r"^MLFLOW_TRACKING_URI holds a password or a token") as error:
            tracking_uri()
        assert "hunter2" not in str(error.value)
    for value in (
        "postgresql://me@db:5432/mlflow?sslmode=require&sslkey=/keys/mlflow.key",
        "http://tracking:5000/a@b",
        "sqlite:////home/me@work/mlflow.db",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        assert tracking_uri() == value


def test_reading_the_settings_imports_nothing_heavy() -> None:
    """A typo must be reported without delay."""
    code = (
        "import sys; from pbe.config import load_params; load_params();"
        "heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'cv2', 'albumentations'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_root())}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_readmes_block_for_own_photos_is_accepted_as_it_stands(load: Load) -> None:
    text = (repo_root() / "README.md").read_text()
    block = next(part for part in text.split("```yaml\n")[1:] if "source: folder" in part).split("```")[0]
    wanted = yaml.safe_load(block)["ingest"]
    got = load({f"ingest.{key}": value for key, value in wanted.items()}).ingest
    assert got.model_dump(include=set(wanted)) == wanted and wanted["val_frac"] > 0


def test_pixels_can_give_all_tokens_though_the_class_token_alone_is_stored(load: Load) -> None:
    params = load({"train.exemplar.tokens": "all", "train.input": "pixels"})
    assert (params.train.input, params.encode.backbone.tokens) == ("pixels", "class")
    assert "or train.input: pixels" in _message(load, {"train.exemplar.tokens": "all", "train.input": "encoded"})
