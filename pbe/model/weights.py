"""Model folders, in the layout of diffusers' Paint by Example pipeline. `train` exports them, `Editor.load` opens them.

    pbe.json                                     values without a place in the layout; a published folder lacks it
    model_index.json                             diffusers' index, if diffusers has all parts (CLIP, AutoencoderKL)
    unet/config.json, diffusion_pytorch_model.safetensors
    image_encoder/config.json, model.safetensors the exemplar mapper, and CLIP's vision part if it is the backbone
    text_encoder/..., tokenizer/...              in its place, if the condition is text (pbe/model/text.py)
    vae/...  or  codec/codec.safetensors         AutoencoderKL, or the patch codec of the sample profile
    scheduler/scheduler_config.json, feature_extractor/preprocessor_config.json
    adapter/...                                  what LoRA added to a base, here merged (pbe/model/adapter.py)

Weights are written as float32 safetensors, never as a pickle. CLIP's tensors are named `model.vision_model.*`, which
transformers 4 and 5 both read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn

from pbe.errors import UserError, one_line
from pbe.model.backbone import Backbone, load_backbone
from pbe.model.card import ModelCard
from pbe.model.clip import MEAN, STD, ClipBackbone, clip_tensors, load_clip, loaded_clip, vision_config
from pbe.model.codec import Codec, PatchCodec, codec_bytes, codec_from_bytes
from pbe.model.exemplar import CaptionContext, ExemplarMapper
from pbe.model.folder import CARD_FILE, CODEC_FILE, STEM, STEMS, ModelError, read_card
from pbe.model.tensors import (
    WeightsError,
    folder_digest,
    new_loaded,
    read_folder,
    read_json,
    save_tensors,
    weight_files_of,
)
from pbe.model.text import TextEncoder, load_text_encoder, save_text_encoder
from pbe.model.unet import ConditionedUNet
from pbe.model.vae import KlCodec, load_vae

MAPPER_PARTS = ("projection.", "mapper.", "final_layer_norm.", "proj_out.", "uncond_vector")
CLIP_LAYERS_PER_BLOCK = 5  # diffusers: (layers + 1) // 5 mapper blocks
ADAPTER_FOLDER = "adapter"
REFERENCE_PAD_PX = 10  # upstream open-images.py


@dataclass(frozen=True)
class Model:
    """A whole model on the CPU, in eval mode."""

    network: ConditionedUNet
    codec: Codec
    backbone: Backbone | TextEncoder  # the frozen encoder of what card.condition names
    card: ModelCard


# -- out -------------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which is new or empty, that takes its name when the block ends; an error leaves nothing.

    Raises WeightsError on a full disk.
    """
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    except SafetensorError as error:  # what a full disk is to it
        raise WeightsError(f"--out {out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(folder: Path, model: Model, *, unet_dtype: torch.dtype = torch.float32) -> None:
    """Write a model folder: the UNet in `unet_dtype`, all else in float32. Raises WeightsError for NaN, and for
    weights beyond `unet_dtype`."""
    unet = model.network.unet
    _write_json(folder / "unet" / "config.json", _plain(unet.config) | {"_class_name": "UNet2DConditionModel"})
    save_tensors(folder / "unet" / f"{STEM}.safetensors", unet.state_dict(), dtype=unet_dtype)

    if isinstance(model.backbone, TextEncoder):
        save_text_encoder(folder, model.backbone)
    else:
        _save_image_encoder(folder, model.network.exemplar, model.backbone)

    if isinstance(model.codec, KlCodec):
        vae = model.codec.vae
        _write_json(folder / "vae" / "config.json", _plain(vae.config) | {"_class_name": "AutoencoderKL"})
        save_tensors(folder / "vae" / f"{STEM}.safetensors", vae.state_dict())
    elif isinstance(model.codec, PatchCodec):
        (folder / CODEC_FILE).parent.mkdir(parents=True, exist_ok=True)
        (folder / CODEC_FILE).write_bytes(codec_bytes(model.codec))

    card = model.card
    _write_json(folder / "scheduler" / "scheduler_config.json", card.scheduler)
    if opens_in_diffusers(model):
        _write_json(folder / "model_index.json", _model_index(card.scheduler))
    unsaid = {"scheduler"} | ({"condition"} if card.condition == "exemplar" else set())
    unsaid |= {"guidance_scale"} if card.guidance_scale is None else set()
    _write_json(folder / CARD_FILE, {name: value for name, value in vars(card).items() if name not in unsaid})


def _save_image_encoder(folder: Path, exemplar: nn.Module, backbone: Backbone) -> None:
    assert isinstance(exemplar, ExemplarMapper)
    encoder = dict(exemplar.state_dict())
    if isinstance(backbone, ClipBackbone):
        clip = clip_tensors(backbone.network.state_dict())
        encoder |= {f"model.vision_model.{name}": value for name, value in clip.items()}
        _write_json(folder / "feature_extractor" / "preprocessor_config.json", _preprocessor(backbone.input_px))
    _write_json(folder / "image_encoder" / "config.json", _encoder_config(exemplar, backbone))
    save_tensors(folder / "image_encoder" / "model.safetensors", encoder)


def opens_in_diffusers(model: Model) -> bool:
    """Return whether PaintByExamplePipeline can load the model: it has a class for every part, builds a mapper of this
    size, and gives it the same tokens."""
    if not (isinstance(model.backbone, ClipBackbone) and isinstance(model.codec, KlCodec)):
        return False
    exemplar = model.network.exemplar
    if model.card.tokens != "class" or not isinstance(exemplar, ExemplarMapper):
        return False
    blocks = (model.backbone.config.num_hidden_layers + 1) // CLIP_LAYERS_PER_BLOCK
    return exemplar.projection is None and len(exemplar.mapper.blocks) == blocks


def _encoder_config(exemplar: ExemplarMapper, backbone: Backbone) -> dict[str, Any]:
    sizes = {
        "mapper_width": exemplar.proj_out.in_features,
        "mapper_blocks": len(exemplar.mapper.blocks),
        "projection_dim": exemplar.proj_out.out_features,
    }
    if isinstance(backbone, ClipBackbone):
        config = backbone.config.to_dict()
        return config | sizes | {"architectures": ["PaintByExampleImageEncoder"], "dtype": "float32"}
    return sizes | {"backbone": backbone.name, "backbone_digest": backbone.digest}


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


def load_exemplar_backbone(folder: Path) -> tuple[Backbone, int]:
    """The frozen backbone of a model folder, or of a CLIP folder, and the px that references keep around their box.

    Raises ModelError, WeightsError.
    """
    if not (folder / "image_encoder" / "config.json").is_file():
        if (folder / "config.json").is_file():
            return load_clip(folder), REFERENCE_PAD_PX
        raise ModelError(
            f"{folder}: no image_encoder/config.json; name a model folder that the train stage exported "
            "(models/<variant>), or one with a CLIP model"
        )
    _, backbone = _read_encoder(folder / "image_encoder")
    return backbone, int(read_card(folder).get("reference_pad_px", REFERENCE_PAD_PX))


def weights_sha256(folder: Path) -> str:
    """SHA-256 in hex of what `load_model` reads: the folder's configs and weight files. Raises ModelError."""
    try:
        files = [folder / "unet" / "config.json", *weight_files_of(folder / "unet", STEM)]
        files += [folder / "image_encoder" / "config.json", *weight_files_of(folder / "image_encoder", *STEMS)]
        if (folder / "vae").is_dir():
            files += [folder / "vae" / "config.json", *weight_files_of(folder / "vae", STEM)]
        else:
            files.append(folder / CODEC_FILE)
        files.append(folder / "scheduler" / "scheduler_config.json")
        files += [path for path in (folder / CARD_FILE,) if path.is_file()]
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except (UserError, OSError) as error:
        raise ModelError(f"{folder}: {one_line(error)}") from None
    return digest.hexdigest()


def _read_model(folder: Path) -> Model:
    config = read_json(folder / "unet" / "config.json")
    tensors = read_folder(folder / "unet", STEM)
    unet = new_loaded(lambda: UNet2DConditionModel.from_config(config), tensors, f"{folder}/unet")
    codec = _read_codec(folder)
    if unet.config.in_channels != 2 * codec.channels + 1 or unet.config.out_channels != codec.channels:
        raise ModelError(
            f"{folder}/unet: {unet.config.in_channels} channels in, {unet.config.out_channels} out; Paint by Example "
            f"with {codec.channels} latent channels has {2 * codec.channels + 1} in, {codec.channels} out"
        )
    said = read_card(folder)
    exemplar: ExemplarMapper | CaptionContext
    backbone: Backbone | TextEncoder
    if said.get("condition") == "text":
        backbone, encoder = load_text_encoder(folder), "text"
        width = backbone.width
        exemplar = CaptionContext(tokens=backbone.token_count, context_width=width)
        exemplar.set_empty(backbone([""]))
    else:
        exemplar, backbone = _read_encoder(folder / "image_encoder")
        encoder, width = "image", exemplar.proj_out.out_features
        said = said or _sizes(unet, codec, backbone)
    if unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{folder}: the UNet takes tokens of width {unet.config.cross_attention_dim}, the {encoder} encoder makes "
            f"width {width}"
        )
    card = ModelCard(scheduler=read_json(folder / "scheduler" / "scheduler_config.json"), **said)
    return Model(ConditionedUNet(unet, exemplar).eval(), codec, backbone, card)


def _sizes(unet: UNet2DConditionModel, codec: Codec, backbone: Backbone) -> dict[str, Any]:
    """What a published folder's pbe.json would say."""
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
