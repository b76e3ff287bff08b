"""Read params.yaml: `load_params` turns the file into a frozen `Params`; no other code sees a dict.

The settings of each stage are beside its code (pbe/settings.py names the files). Every message names the key, the
value that was given and what is allowed.
"""

import copy
import os
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, Tag, ValidationError, model_validator

from pbe.data.filter import FilterConfig
from pbe.data.settings import IngestConfig, MaterializeConfig
from pbe.errors import ParamsError, one_line
from pbe.evaluate.settings import (
    BaselineConfig,
    BenchConfig,
    EditConfig,
    EvaluateConfig,
    FolderBaseline,
    GuidanceScale,
    SweepConfig,
    VariantName,
)
from pbe.model.settings import EncodeConfig
from pbe.places import repo_root
from pbe.settings import Seed, Settings, paths_in
from pbe.study.settings import StudyConfig
from pbe.train.settings import TrainConfig


class VariantEdit(Settings):
    """The keys of `edit` that a variant may override; the others must be equal for results to be comparable."""

    guidance_scale: GuidanceScale | None = None


class VariantConfig(Settings):
    """One row of the ablation: the train keys, and the guidance scale, that differ from `train` and `edit`."""

    train: dict[str, Any] = Field({})
    edit: VariantEdit = VariantEdit()


class Params(Settings):
    """All of params.yaml."""

    seed: Seed
    ingest: IngestConfig
    filter: FilterConfig
    materialize: MaterializeConfig
    encode: EncodeConfig
    train: TrainConfig
    bench: BenchConfig
    edit: EditConfig
    evaluate: EvaluateConfig
    sweep: SweepConfig
    study: StudyConfig
    variants: dict[VariantName, VariantConfig] = Field(min_length=1)
    baselines: dict[VariantName, BaselineConfig]

    @model_validator(mode="after")
    def _fits_together(self) -> "Params":
        codec = self.encode.codec
        if codec.kind == "patch" and self.materialize.image_px % codec.patch_px:
            raise ValueError(
                f"encode.codec.patch_px {codec.patch_px} must divide materialize.image_px {self.materialize.image_px}"
            )
        if "card" in self.variants or "card" in self.baselines:
            raise ValueError("'card' is a reserved name (metrics.json uses it); rename the variant or baseline")
        if "pretrained" in self.variants:
            raise ValueError("'pretrained' is a reserved name (models/pretrained is in git); rename the variant")
        folders = [name for name, baseline in self.baselines.items() if isinstance(baseline, FolderBaseline)]
        if folders and self.edit.holes[0] != "box":
            raise ValueError(
                f"edit.holes {list(self.edit.holes)}: baselines.{folders[0]} is a folder of results for box holes; "
                "put box first"
            )
        if both := sorted(self.variants.keys() & self.baselines.keys()):
            raise ValueError(f"{both[0]} is both a variant and a baseline; rename one")
        if self.sweep.variant not in self.variants:
            raise ValueError(
                f"sweep.variant {self.sweep.variant} is not a variant; choose from: {', '.join(self.variants)}"
            )
        unknown = [name for name in self.study.methods or () if name not in {**self.variants, **self.baselines}]
        if unknown:
            raise ValueError(
                f"study.methods: {unknown[0]} is neither a variant nor a baseline; choose from: "
                f"{', '.join([*self.variants, *self.baselines])}"
            )
        return self

    def train_variant(self, name: str) -> TrainConfig:
        """The train config of one variant. Raises ParamsError for an unknown name."""
        return TrainConfig.model_validate(merged(self.train.model_dump(), self._variant(name).train))

    def edit_variant(self, name: str) -> EditConfig:
        """The edit config of one variant. Raises ParamsError for an unknown name."""
        scale = self._variant(name).edit.guidance_scale
        return self.edit if scale is None else self.edit.model_copy(update={"guidance_scale": scale})

    def _variant(self, name: str) -> VariantConfig:
        if name not in self.variants:
            raise ParamsError(f"variant '{name}' is not in params.yaml; it names: {', '.join(self.variants)}")
        return self.variants[name]


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with the keys of `over`, merged recursively."""
    out = copy.copy(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


class _UniqueKeys(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML's safe loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_params(path: Path | None = None) -> Params:
    """Read and check params.yaml. Raises ParamsError, one line per wrong key, each with what is allowed."""
    path = path or repo_root() / "params.yaml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: not found; `make profile P=sample` writes it") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name}: not valid YAML: {one_line(error)}") from None
    return parse_params(text, path.name)


def parse_params(text: str, file: str) -> Params:
    """Check the text of a params.yaml, named `file` in messages. Raises ParamsError."""
    try:
        raw = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ParamsError(f"{file}: not valid YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{file}: must be a mapping of stages to settings")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(_lines(error, file, Params))) from None
    first = next(iter(params.variants))
    for name in params.variants:
        try:
            cfg = params.train_variant(name)
        except ValidationError as error:
            raise ParamsError("\n".join(_lines(error, file, TrainConfig, f"variants.{name}.train."))) from None
        _check_variant(params, name, cfg, file)
        _refuse_own_output(params, name, cfg, file)
        if cfg.condition == "text" and name in (first, params.sweep.variant):
            role = "the first, which all others are compared with" if name == first else "sweep.variant"
            raise ParamsError(
                f"{file}: variants.{name}: has train.condition: text, but is {role}; that must be one of exemplars"
            )
    return params


def _check_variant(params: Params, name: str, cfg: TrainConfig, file: str) -> None:
    over = params.variants[name].train
    if cfg.condition == "text" and (
        unread := sorted(over.keys() & {"exemplar", "pair_prob", "reference_augmentation"})
    ):
        raise ParamsError(
            f"{file}: variants.{name}.train.{unread[0]}: of exemplars, which a variant with train.condition: text does "
            "not read; leave it out"
        )
    if cfg.exemplar.tokens == "all" and cfg.input == "encoded" and params.encode.backbone.tokens != "all":
        raise ParamsError(
            f"{file}: variants.{name}: train.exemplar.tokens = 'all' needs encode.backbone.tokens: all, so that they "
            "are stored, or train.input: pixels"
        )
    halvings, codec = len(cfg.unet.block_channels) - 1, params.encode.codec
    # AutoencoderKL's cell size is in its weights; the train stage checks it
    latent_px = params.materialize.image_px // codec.patch_px if codec.kind == "patch" else 0
    if latent_px % 2**halvings:
        raise ParamsError(
            f"{file}: variants.{name}: latents of {latent_px} px (materialize.image_px / encode.codec.patch_px) cannot "
            f"be halved {halvings} times, as the {halvings + 1} levels of train.unet.block_channels require"
        )


def _refuse_own_output(params: Params, name: str, cfg: TrainConfig, file: str) -> None:
    """DVC deletes models/<variant> before it trains the variant, which would then find no weights there."""
    output = repo_root() / "models" / name
    for key, value in [("train.init", cfg.init), *paths_in(params.encode, "encode.")]:
        if Path(os.path.normpath(repo_root() / value)).is_relative_to(output):
            raise ParamsError(
                f"{file}: {key} = {value}: training the variant '{name}' replaces models/{name}; rename the variant, "
                "or move the model"
            )


def _lines(error: ValidationError, file: str, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per invalid key of `model`."""
    out = []
    items = error.errors()
    for item in items:
        if any(
            other["loc"][: len(item["loc"])] == item["loc"] for other in items if len(other["loc"]) > len(item["loc"])
        ):
            continue  # a list is "too short" because its items are invalid
        names, owner, annotation = _place(item["loc"], model)
        key, given = (prefix + ".".join(names)).rstrip("."), item["input"]
        if kinds := _by_kind(annotation):
            given = given.get("kind") if isinstance(given, dict) else given
            out.append(f"{file}: {key}.kind = {given!r}: allowed are {', '.join(kinds)}")
        elif item["type"] == "extra_forbidden":
            known = sorted(owner.model_fields)
            out.append(f"{file}: {key} = {given!r}: unknown key; allowed here: {', '.join(known)}")
        elif item["type"] == "missing":
            out.append(f"{file}: {key}: required key is missing")
        elif item["type"] == "value_error":
            out.append(f"{file}: {key or 'params'}: {item['ctx']['error']}")
        else:
            out.append(f"{file}: {key} = {given!r}: {item['msg'][0].lower() + item['msg'][1:]}")
    return out


def _place(loc: tuple[Any, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel], Any]:
    """Resolve an error's location: keys of the file, the model that the last key belongs to, and that key's type.

    The keys omit the kinds and tags that pydantic inserts after a key of several models."""
    names: list[str] = []
    annotation: Any = model
    for part in loc:
        if kinds := _by_kind(annotation):
            annotation = kinds[part]
            continue
        if tags := _by_tag(annotation):
            annotation = tags[part]
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        elif get_origin(annotation) in (tuple, dict):
            annotation = get_args(annotation)[get_origin(annotation) is dict]
        names.append(str(part))
    return names, model, annotation


def _by_kind(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of a key that may hold several, by kind; empty for any other key."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    models = [option for option in get_args(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]
    return {
        kind: model
        for model in models
        if "kind" in model.model_fields
        for kind in get_args(model.model_fields["kind"].annotation)
    }


def _by_tag(annotation: Any) -> dict[str, Any]:
    """The types of a key that may hold several, by pydantic's tag; empty for any other key."""
    return {
        item.tag: get_args(option)[0]
        for option in get_args(annotation)
        if get_origin(option) is Annotated
        for item in get_args(option)[1:]
        if isinstance(item, Tag)
    }
