"""Model folders, in the layout of diffusers' Paint by Example pipeline. `train` exports them, `Editor.load` opens them.

    pbe.json                                     values without a place in the layout; a published folder lacks it
    model_index.json                             diffusers' index, if diffusers has all parts (CLIP, AutoencoderKL)
    unet/config.json, diffusion_pytorch_model.safetensors
    image_encoder/config.json, model.safetensors the exemplar mapper, and CLIP's vision part if it is the backbone
    vae/...  or  codec/codec.safetensors         AutoencoderKL, or the patch codec of the sample profile
    scheduler/scheduler_config.json, feature_extractor/preprocessor_config.json

Weights are written as float32 safetensors, never as a pickle. CLIP's tensors are named `model.vision_model.*`, which
transformers 4 and 5 both read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from pbe.errors import UserError, one_line
from pbe.model.backbone import Backbone, load_backbone
from pbe.model.card import ModelCard
from pbe.model.clip import MEAN, STD, STEMS, ClipBackbone, clip_tensors, loaded_clip, vision_config
from pbe.model.codec import CODEC_FILE, Codec, PatchCodec, codec_bytes, codec_from_bytes
from pbe.model.exemplar import ExemplarMapper
from pbe.model.tensors import folder_digest, new_loaded, read_folder, read_json, refuse_non_finite
from pbe.model.unet import ConditionedUNet
from pbe.model.vae import STEM, KlCodec, load_vae

MAPPER_PARTS = ("projection.", "mapper.", "final_layer_norm.", "proj_out.", "uncond_vector")
CLIP_LAYERS_PER_BLOCK = 5  # diffusers: (layers + 1) // 5 mapper blocks
REFERENCE_PAD_PX = 10  # upstream open-images.py


class ModelError(UserError, ValueError):
    """A model folder is missing or incomplete, or its parts do not match; the message says what."""


@dataclass(frozen=True)
class Model:
    """A whole model on the CPU, in eval mode."""

    network: ConditionedUNet
    codec: Codec
    backbone: Backbone
    card: ModelCard


# -- out -------------------------------------------------------------------------------------------------------------


def save_model(folder: Path, model: Model) -> None:
    """Write a model folder. Tensors are copied to contiguous float32 on the CPU. Raises WeightsError for NaN."""
    unet = model.network.unet
    _write_json(folder / "unet" / "config.json", _plain(unet.config) | {"_class_name": "UNet2DConditionModel"})
    _save(folder / "unet" / f"{STEM}.safetensors", unet.state_dict())

    encoder = dict(model.network.exemplar.state_dict())
    if isinstance(model.backbone, ClipBackbone):
        clip = clip_tensors(model.backbone.network.state_dict())
        encoder |= {f"model.vision_model.{name}": value for name, value in clip.items()}
        pixels = _preprocessor(model.backbone.input_px)
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", pixels)
    _write_json(folder / "image_encoder" / "config.json", _encoder_config(model))
    _save(folder / "image_encoder" / "model.safetensors", encoder)

    if isinstance(model.codec, KlCodec):
        vae = model.codec.vae
        _write_json(folder / "vae" / "config.json", _plain(vae.config) | {"_class_name": "AutoencoderKL"})
        _save(folder / "vae" / f"{STEM}.safetensors", vae.state_dict())
    elif isinstance(model.codec, PatchCodec):
        (folder / CODEC_FILE).parent.mkdir(parents=True, exist_ok=True)
        (folder / CODEC_FILE).write_bytes(codec_bytes(model.codec))

    card = model.card
    _write_json(folder / "scheduler" / "scheduler_config.json", card.scheduler)
    if opens_in_diffusers(model):
        _write_json(folder / "model_index.json", _model_index(card.scheduler))
    _write_json(folder / "pbe.json", {name: value for name, value in vars(card).items() if name != "scheduler"})


def opens_in_diffusers(model: Model) -> bool:
    """Return whether PaintByExamplePipeline can load the model: it has a class for every part, builds a mapper of this
    size, and gives it the same tokens."""
    if not (isinstance(model.backbone, ClipBackbone) and isinstance(model.codec, KlCodec)):
        return False
    exemplar = model.network.exemplar
    if model.card.tokens != "class":
        return False
    blocks = (model.backbone.config.num_hidden_layers + 1) // CLIP_LAYERS_PER_BLOCK
    return exemplar.projection is None and len(exemplar.mapper.blocks) == blocks


def _encoder_config(model: Model) -> dict[str, Any]:
    exemplar = model.network.exemplar
    sizes = {
        "mapper_width": exemplar.proj_out.in_features,
        "mapper_blocks": len(exemplar.mapper.blocks),
        "projection_dim": exemplar.proj_out.out_features,
    }
    if isinstance(model.backbone, ClipBackbone):
        config = model.backbone.config.to_dict()
        return config | sizes | {"architectures": ["PaintByExampleImageEncoder"], "dtype": "float32"}
    return sizes | {"backbone": model.backbone.name, "backbone_digest": model.backbone.digest}


def _preprocessor(side_px: int) -> dict[str, Any]:
    """CLIP's preprocessing. diffusers' pipeline centre-crops the reference; upstream and this project squash it."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": {"shortest_edge": side_px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side_px, "width": side_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }


def _model_index(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "PaintByExamplePipeline",
        "_diffusers_version": "0.33.1",  # the last that supported it
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["paint_by_example", "PaintByExampleImageEncoder"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the path that it was read from."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().float().cpu().contiguous().clone() for name, value in tensors.items()}
    refuse_non_finite(plain, f"{path}: not written")
    save_file(plain, path, metadata={"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# -- in --------------------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> Model:
    """Read a model folder strictly: a missing, unknown or misshapen tensor is an error. Raises ModelError."""
    if not (folder / "unet" / "config.json").is_file():
        raise ModelError(
            f"{folder}: no unet/config.json; name a model folder that the train stage exported (models/<variant>), or "
            "one in the layout of Paint by Example on the hub"
        )
    try:
        return _read_model(folder)
    except UserError as error:
        message = str(error)
        raise ModelError(message if str(folder) in message else f"{folder}: {message}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ModelError(f"{folder}: its files are damaged or do not match each other ({reason})") from error


def _read_model(folder: Path) -> Model:
    config = read_json(folder / "unet" / "config.json")
    tensors = read_folder(folder / "unet", STEM)
    unet = new_loaded(lambda: UNet2DConditionModel.from_config(config), tensors, f"{folder}/unet")
    exemplar, backbone = _read_encoder(folder / "image_encoder")
    codec = _read_codec(folder)
    if unet.config.in_channels != 2 * codec.channels + 1 or unet.config.out_channels != codec.channels:
        raise ModelError(
            f"{folder}/unet: {unet.config.in_channels} channels in, {unet.config.out_channels} out; Paint by Example "
            f"with {codec.channels} latent channels has {2 * codec.channels + 1} in, {codec.channels} out"
        )
    if unet.config.cross_attention_dim != exemplar.proj_out.out_features:
        raise ModelError(
            f"{folder}: the UNet takes tokens of width {unet.config.cross_attention_dim}, the image encoder makes "
            f"width {exemplar.proj_out.out_features}"
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    card = ModelCard(scheduler=scheduler, **_sizes(folder, unet, codec, backbone))
    return Model(ConditionedUNet(unet, exemplar).eval(), codec, backbone, card)


def _sizes(folder: Path, unet: UNet2DConditionModel, codec: Codec, backbone: Backbone) -> dict[str, Any]:
    if (folder / "pbe.json").is_file():
        return read_json(folder / "pbe.json")
    return {
        "image_px": unet.config.sample_size * codec.patch_px,
        "reference_px": backbone.input_px,
        "reference_pad_px": REFERENCE_PAD_PX,
        "tokens": "class",
        "run": {},
    }


def _read_encoder(folder: Path) -> tuple[ExemplarMapper, Backbone]:
    raw = read_json(folder / "config.json")
    tensors = read_folder(folder, *STEMS)
    backbone: Backbone
    if "backbone" in raw:  # its weights come in a pip package
        backbone, blocks = load_backbone(raw["backbone"]), raw["mapper_blocks"]
        if backbone.digest != raw["backbone_digest"]:
            raise ModelError(
                f"{folder}: made with {raw['backbone']} {raw['backbone_digest']}, but {backbone.digest} is installed"
            )
    else:
        network = loaded_clip(vision_config(raw, str(folder)), clip_tensors(tensors), str(folder))
        backbone = ClipBackbone(network, digest=folder_digest(folder, *STEMS))
        blocks = raw.get("mapper_blocks", (network.config.num_hidden_layers + 1) // CLIP_LAYERS_PER_BLOCK)
    mapper = {name: value for name, value in tensors.items() if name.startswith(MAPPER_PARTS)}
    exemplar = new_loaded(
        lambda: ExemplarMapper(
            backbone_width=backbone.width,
            mapper_width=raw.get("mapper_width", backbone.width),
            mapper_blocks=blocks,
            context_width=raw["projection_dim"],
        ),
        mapper,
        str(folder),
    )
    return exemplar, backbone


def _read_codec(folder: Path) -> Codec:
    if (folder / "vae").is_dir():
        return load_vae(folder / "vae")
    path = folder / CODEC_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: neither vae/ nor {CODEC_FILE} in it")
    return codec_from_bytes(path.read_bytes(), str(path))
