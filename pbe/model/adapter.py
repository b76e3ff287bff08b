"""LoRA (arXiv 2106.09685): low-rank updates of a frozen UNet's layers, by peft through diffusers.

    W x + alpha / rank * B A x,   A (rank, in) from N(0, 1 / rank^2), B (out, rank) zero at first

The initial A is that of diffusers' train_text_to_image_lora.py. An adapter is a folder; `train` exports it beside the
merged model, to which it adds nothing but its size:

    adapter.json                         the base that it belongs to, rank, alpha, targets, the model's card
    pytorch_lora_weights.safetensors     A and B, in diffusers' layout
    mapper.safetensors                   the exemplar mapper, trained in full, with the names of image_encoder/

In diffusers: `pipe.unet.load_lora_adapter(folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors")`, and
the mapper into `pipe.image_encoder` by load_state_dict(..., strict=False).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor, nn

from pbe.errors import UserError, one_line
from pbe.model.card import ModelCard
from pbe.model.folder import ADAPTER_FILE, STEM, read_card
from pbe.model.settings import LoraConfig
from pbe.model.tensors import (
    check_fit,
    folder_digest,
    load_strictly,
    read_json,
    read_tensors,
    refuse_non_finite,
    save_tensors,
)
from pbe.model.unet import ConditionedUNet
from pbe.model.weights import Model, load_model
from pbe.store import write_json

LORA_FILE, MAPPER_FILE = "pytorch_lora_weights.safetensors", "mapper.safetensors"
FILES = (ADAPTER_FILE, LORA_FILE, MAPPER_FILE)
_CARRIERS = (nn.Linear, nn.Conv2d)  # layers that may get an update


class AdapterError(UserError, ValueError):
    """An adapter is damaged, or of another base; or a layer to adapt does not exist. The message says which."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    name: as train.init named it. unet, image_encoder: paths in the storage, which end in the digest of their weights.
    codec_sha256: of a patch codec's file; None for AutoencoderKL.
    """

    name: str
    unet: str
    image_encoder: str
    codec_sha256: str | None


@dataclass(frozen=True)
class Adapter:
    """What adapter.json says."""

    base: Base
    lora: LoraConfig
    card: ModelCard


def add_lora(unet: UNet2DConditionModel, cfg: LoraConfig, *, seed: int) -> None:
    """Freeze the UNet and add a trainable update to each target; its output is unchanged at first.

    Raises AdapterError for a target that it does not have.
    """
    from peft import LoraConfig as PeftConfig  # imported here: few runs need it

    layers = [name for name, module in unet.named_modules() if isinstance(module, _CARRIERS)]
    for target in cfg.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
            raise AdapterError(
                f"train.trainable.lora.targets: the UNet has no linear layer or convolution named {target!r}; it has "
                f"{', '.join(known)}, and to_out.0"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            PeftConfig(
                r=cfg.rank,
                lora_alpha=cfg.rank if cfg.alpha is None else cfg.alpha,
                init_lora_weights="gaussian",
                target_modules=list(cfg.targets),
            )
        )


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Add the updates to the weights that they belong to; the UNet is then a plain one."""
    unet.fuse_lora()
    unet.unload_lora()


# -- out -------------------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, network: ConditionedUNet, adapter: Adapter) -> None:
    """Write the updates that `add_lora` added to `network`, and its mapper. Raises WeightsError for NaN."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    [config] = network.unet.peft_config.values()
    # a set's order differs from process to process, and the file's bytes with it
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    header = json.dumps({f"unet.{key}": value for key, value in said.items()}, sort_keys=True)
    save_tensors(
        folder / LORA_FILE,
        {f"unet.{name}": value for name, value in _updates(network.unet).items()},
        metadata={LORA_ADAPTER_METADATA_KEY: header},  # without it diffusers takes the rank for alpha
    )
    save_tensors(folder / MAPPER_FILE, network.exemplar.state_dict())
    lora = adapter.lora.model_dump(mode="json")
    card = {name: value for name, value in vars(adapter.card).items() if value is not None}
    write_json(folder / ADAPTER_FILE, {"base": vars(adapter.base), "lora": lora, "card": card})


def _updates(unet: UNet2DConditionModel) -> Mapping[str, Tensor]:
    """A and B by name, without the adapter's name in it."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(unet)


# -- in --------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """What an adapter's folder says about itself. Raises AdapterError, ModelError, WeightsError."""
    read_card(folder)  # for its check
    said = read_json(folder / ADAPTER_FILE)
    try:
        return Adapter(Base(**said["base"]), LoraConfig.model_validate(said["lora"]), ModelCard(**said["card"]))
    except (KeyError, TypeError, ValidationError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise AdapterError(f"{folder / ADAPTER_FILE}: does not describe an adapter ({reason})") from None


def load_adapter(network: ConditionedUNet, folder: Path) -> None:
    """Load an adapter's weights into a network with `add_lora` of the same settings. Raises WeightsError."""
    from peft import set_peft_model_state_dict

    tensors = {name.removeprefix("unet."): value for name, value in read_tensors(folder / LORA_FILE).items()}
    refuse_non_finite(tensors, str(folder / LORA_FILE))
    check_fit(_updates(network.unet), tensors, str(folder / LORA_FILE))
    set_peft_model_state_dict(network.unet, tensors)
    mapper = read_tensors(folder / MAPPER_FILE)
    refuse_non_finite(mapper, str(folder / MAPPER_FILE))
    load_strictly(network.exemplar, mapper, str(folder / MAPPER_FILE))


def load_adapted(folder: Path, base: Path) -> Model:
    """The model folder `base` with an adapter merged into it. Raises AdapterError, ModelError, WeightsError."""
    adapter = read_adapter(folder)
    if not (base / "unet").is_dir() or not adapter.base.unet.endswith(f"-{folder_digest(base / 'unet', STEM)}"):
        raise AdapterError(f"{folder}: an adapter of {adapter.base.name}; the UNet of {base} is another")
    model = load_model(base)
    network = ConditionedUNet(model.network.unet, model.network.exemplar)
    add_lora(network.unet, adapter.lora, seed=0)
    load_adapter(network, folder)
    merge_lora(network.unet)
    return replace(model, network=network.eval(), card=adapter.card)


def describe(lora: LoraConfig) -> str:
    """As params.yaml would have it."""
    told: dict[str, Any] = {"rank": lora.rank} | lora.model_dump(mode="json", exclude_defaults=True)
    inner = ", ".join(f"{key}: {value}" for key, value in told.items())
    return f"{{lora: {{{inner}}}}}"
