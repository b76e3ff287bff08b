"""The weights that a training begins with: found where params.yaml names them, checked, and copied to the storage.

From then on workers and the export read the copies, even if the originals change or disappear. Each error is one line
that names the key. torch and diffusers are imported only where weights have to be opened.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.errors import UserError
from pbe.model.architecture import Architecture, architecture_of
from pbe.store import Manifest, Store
from pbe.train.settings import LoraTrainable, TrainConfig
from pipelines.runtime.stage import Stage, StageError

if TYPE_CHECKING:
    import torch

    from pbe.train.scoring import Judge


@dataclass(frozen=True)
class StoredText:
    """A text encoder's path in the storage, and the number of its tokens."""

    path: str
    tokens: int


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's path in the storage, and the name of the model that it belongs to."""

    path: str
    base_name: str


@dataclass(frozen=True)
class StartingPoint:
    """What a training begins with, apart from its rows.

    initial: paths in the storage of a UNet and of an image encoder; None: random weights. guidance_scale: that which
    the card of the model in `train.init` names, if it names one; the trained model's card repeats it.
    """

    initial: tuple[str, str | None] | None
    adapter: StoredAdapter | None
    text: StoredText | None
    guidance_scale: float | None

    @property
    def paths(self) -> list[str]:
        """Every path in the storage that training reads weights from."""
        named = (*(self.initial or ()), self.adapter and self.adapter.path, self.text and self.text.path)
        return [path for path in named if path]


def starting_point(stage: Stage, cfg: TrainConfig, encoded: Manifest) -> StartingPoint:
    """Copy the weights that `cfg` names to the storage, unless it has them. Raises StageError, UserError."""
    initial, adapter = initial_weights(stage, cfg, encoded)
    text = text_encoder(stage, cfg) if cfg.condition == "text" else None
    return StartingPoint(initial, adapter, text, _guidance_scale_of(cfg.init))


def architecture(stage: Stage, cfg: TrainConfig, encoded: Manifest, start: StartingPoint) -> Architecture:
    """That of the network which training begins with."""
    return architecture_of(
        cfg.unet,
        cfg.exemplar,
        image_px=stage.params.materialize.image_px,
        encoded=encoded.config,
        caption_tokens=start.text.tokens if start.text else None,
    )


def initial_weights(
    stage: Stage, cfg: TrainConfig, encoded: Manifest
) -> tuple[tuple[str, str | None] | None, StoredAdapter | None]:
    """Storage paths of the UNet and of the image encoder that training starts from, None for random weights, and the
    adapter of them that it starts from, if `train.init` is one."""
    if cfg.init == "random":
        return None, None
    from pbe.model.folder import CODEC_FILE, STEM, STEMS, is_adapter
    from pbe.model.tensors import read_json
    from pbe.model.weight_store import store_weights

    name, folder = _model(cfg.init)
    if is_adapter(folder):
        return adapter_weights(stage, cfg, encoded, folder)
    codec = encoded.config["codec"]
    if (folder / CODEC_FILE).is_file() and (folder / CODEC_FILE).read_bytes() != stage.store.read_bytes(codec["path"]):
        raise StageError(
            f"train.init = {cfg.init}: its codec is not the one that encoded these rows; set "
            f"encode.codec: {{kind: pretrained, weights: {cfg.init}}}"
        )
    unet = store_weights(stage.store, folder / "unet", "unet", STEM)
    has_encoder = (folder / "image_encoder").is_dir()
    if cfg.condition == "text" and has_encoder:
        raise StageError(
            f"train.init = {cfg.init}: a Paint by Example model, whose UNet reads exemplars; train.condition = text "
            "starts from Stable Diffusion (sd) or random"
        )
    if cfg.trainable != "all" and not has_encoder:
        raise StageError(
            f"train.init = {cfg.init}: not a Paint by Example model: the UNet's new input channels start at zero, and "
            f"train.trainable = {_what_trains(cfg)} would leave them there; set train.trainable: all"
        )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if has_encoder and scheduler.is_file():
        refuse_other_objective(cfg, read_json(scheduler))
    encoder = store_weights(stage.store, folder / "image_encoder", "image_encoder", *STEMS) if has_encoder else None
    mapper = f", {encoder}" if encoder else "; the mapper is random" if cfg.condition == "exemplar" else ""
    print(f"train@{stage.variant}: starts from {name}: {unet}{mapper}")
    return (unet, encoder), None


def refuse_other_objective(cfg: TrainConfig, scheduler: Mapping[str, Any]) -> None:
    """Raise StageError where weights that stay as they are would be used as if they predicted something else.

    scheduler: the config of the model that `train.init` names. A whole network may be trained to another objective.
    """
    if cfg.steps and cfg.trainable == "all":
        return
    from pbe.diffusion.schedule import objective_of

    objective, beta_schedule = objective_of(scheduler), scheduler.get("beta_schedule", cfg.beta_schedule)
    if (objective, beta_schedule) != (cfg.objective, cfg.beta_schedule):
        raise StageError(
            f"train.init = {cfg.init}: it predicts {objective} under the noise schedule {beta_schedule}; set "
            f"train.objective: {objective} and train.beta_schedule: {beta_schedule}"
        )


def adapter_weights(
    stage: Stage, cfg: TrainConfig, encoded: Manifest, folder: Path
) -> tuple[tuple[str, str | None], StoredAdapter]:
    """`initial_weights` for the folder of an adapter, whose base is in the storage or where its name says.

    Raises StageError, AdapterError, WeightsError.
    """
    from pbe.model.adapter import describe, read_adapter
    from pbe.model.folder import STEM, STEMS
    from pbe.model.hub import weights_folder
    from pbe.model.weight_store import store_adapter, store_weights, stored_codec_sha256

    adapter = read_adapter(folder)
    if not isinstance(cfg.trainable, LoraTrainable) or cfg.trainable.lora != adapter.lora:
        raise StageError(
            f"train.init = {cfg.init}: an adapter; to train it further, set train.trainable: {describe(adapter.lora)}, "
            "or name the merged model, whose folder contains the adapter"
        )
    refuse_other_objective(cfg, adapter.card.scheduler)
    base = adapter.base
    if base.codec_sha256 != stored_codec_sha256(stage.store, encoded.config["codec"]):
        raise StageError(
            f"train.init = {cfg.init}: its codec is not the one that encoded these rows; set "
            f"encode.codec: {{kind: pretrained, weights: {base.name}}}"
        )
    if not all(stage.store.exists(f"{path}/record.json") for path in (base.unet, base.image_encoder)):
        source = weights_folder(base.name, parts=["unet", "image_encoder"])
        unet = store_weights(stage.store, source / "unet", "unet", STEM)
        encoder = store_weights(stage.store, source / "image_encoder", "image_encoder", *STEMS)
        if (unet, encoder) != (base.unet, base.image_encoder):
            raise StageError(
                f"train.init = {cfg.init}: an adapter of {base.name}, whose weights have changed since; put them back, "
                "or train a new adapter"
            )
    stored = StoredAdapter(store_adapter(stage.store, folder), base.name)
    print(f"train@{stage.variant}: starts from {stored.path}, an adapter of {base.name}: {base.unet}")
    return (base.unet, base.image_encoder), stored


def _what_trains(cfg: TrainConfig) -> str:
    return cfg.trainable if isinstance(cfg.trainable, str) else "lora"


def text_encoder(stage: Stage, cfg: TrainConfig) -> StoredText:
    """Copy the text encoder to the storage, which then has what the workers and the export read."""
    from pbe.model.hub import weights_folder
    from pbe.model.text import PARTS, load_text_encoder
    from pbe.model.weight_store import store_text_encoder

    backbone, name, key = stage.params.encode.backbone, cfg.text.encoder, "train.text.encoder"
    if name is None and backbone.kind == "clip":
        name, key = backbone.weights, "encode.backbone.weights"
    if name is None:
        raise StageError(
            f"train@{stage.variant}: train.condition = text needs a text encoder, and encode.backbone is no CLIP; name "
            "a CLIP or a sentence encoder in train.text.encoder"
        )
    try:
        encoder = load_text_encoder(weights_folder(name, parts=[*PARTS, ""]))
    except UserError as error:
        raise StageError(f"train@{stage.variant}: {key} = {name}: {error}") from None
    if encoder.width != cfg.unet.context_width:
        raise StageError(
            f"train@{stage.variant}: {key} = {name}: its tokens have width {encoder.width}; set "
            f"train.unet.context_width ({cfg.unet.context_width}) to that, or name another text encoder"
        )
    path = store_text_encoder(stage.store, encoder)
    print(f"train@{stage.variant}: text encoder {name}: {path}, {encoder.token_count} tokens of {encoder.width}")
    return StoredText(path, encoder.token_count)


def score_judge(stage: Stage, cfg: TrainConfig) -> "Callable[[Store, torch.device], Judge]":
    """Copy the weights of `train.score_extractor` to the storage, and return how workers open them.

    They are loaded once here, because workers would fail later, on every rank at once. Raises StageError.
    """
    from pbe.evaluate.features.weights import store_extractor
    from pbe.evaluate.judge import CPU, open_judge
    from pbe.evaluate.settings import ClipExtractorConfig, EfficientNetExtractorConfig
    from pbe.model.hub import weights_folder

    named, key = cfg.score_extractor, "train.score_extractor"
    try:
        if named.kind == "clip":
            key = f"{key}.weights = {named.weights}"
            weights_folder(named.weights, parts=[""])
            entry = store_extractor(stage.store, ClipExtractorConfig(kind="clip", weights=named.weights, mixture=None))
        else:
            entry = store_extractor(stage.store, EfficientNetExtractorConfig(kind=named.kind))
        open_judge(entry, stage.store, CPU)
    except UserError as error:
        raise StageError(f"train@{stage.variant}: {key}: {error}") from None
    return partial(open_judge, entry)


def _guidance_scale_of(init: str) -> float | None:
    """That of the model that `train.init` names, if its card names one."""
    if init == "random":
        return None
    from pbe.model.folder import guidance_scale_of

    return guidance_scale_of(_model(init)[1])


def _model(init: str) -> tuple[str, Path]:
    """Name and folder of the model that `train.init` names; not of random."""
    from pbe.model.hub import STABLE_DIFFUSION, weights_folder

    name = STABLE_DIFFUSION if init == "sd" else init
    return name, weights_folder(name, parts=["unet", "image_encoder"])
