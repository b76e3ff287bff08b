"""A model folder: what `train` exports and `Editor.load` opens. Weights are safetensors, never a pickle.

<folder>/model.json            architecture, objective, schedule, pixel sizes, digests
<folder>/model.safetensors     UNet and exemplar mapper, float32
<folder>/codec.safetensors     pixel codec
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pbe.errors import UserError
from pbe.model.codec import PatchCodec, codec_bytes, codec_from_bytes
from pbe.model.unet import Architecture, ConditionedUNet


class ModelError(UserError, ValueError):
    """A model folder is missing, incomplete or does not fit; the message says what."""


@dataclass(frozen=True)
class ModelCard:
    """Everything besides the tensors that using the model needs."""

    arch: Architecture
    backbone: Literal["efficientnet_lite0", "efficientnet_lite2"]
    image_px: int
    reference_px: int
    reference_pad_px: int
    scheduler: dict[str, Any]  # diffusers' config: betas, what the network predicts, spacing of the timesteps
    run: dict[str, Any]  # variant, digest, steps, data digest, commit


def save_model(folder: Path, *, model: ConditionedUNet, codec: PatchCodec, card: ModelCard) -> None:
    """Write the folder; tensors are copied to contiguous float32 on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "codec.safetensors").write_bytes(codec_bytes(codec))
    (folder / "model.json").write_text(json.dumps(asdict(card), indent=1, sort_keys=True) + "\n")


def load_model(folder: Path) -> tuple[ConditionedUNet, PatchCodec, ModelCard]:
    """Read a model folder, strictly: a missing or unknown tensor is an error. Models come back in eval mode."""
    for name in ("model.json", "model.safetensors", "codec.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; a model folder is what the train stage exports (models/<variant>)")
    try:
        return _read_model(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(f"{folder}: its files are damaged or do not fit one another ({reason})") from error


def _read_model(folder: Path) -> tuple[ConditionedUNet, PatchCodec, ModelCard]:
    raw = json.loads((folder / "model.json").read_text())
    arch_raw = raw.pop("arch")
    tuples = {key: tuple(value) for key, value in arch_raw.items() if isinstance(value, list)}
    arch = Architecture(**{**arch_raw, **tuples})
    card = ModelCard(arch=arch, **raw)
    model = ConditionedUNet(arch)
    problems = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise ModelError(
            f"{folder}/model.safetensors does not fit model.json: missing {problems.missing_keys[:3]}, "
            f"unexpected {problems.unexpected_keys[:3]}"
        )
    return (
        model.eval(),
        codec_from_bytes((folder / "codec.safetensors").read_bytes(), f"{folder}/codec.safetensors"),
        card,
    )
