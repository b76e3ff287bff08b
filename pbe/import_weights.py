"""`pbe import`: converts published weights, a checkpoint of the original code or a hub folder, to pbe's folders.

    Paint by Example, one file      a model folder, as `train` exports it
    Paint by Example, hub folder    the same folder, with safetensors, names and types as pbe writes them
    Stable Diffusion 1.x, one file  unet/ and vae/ in diffusers' layout, to start training from
    an adapter, with its base       a model folder, the adapter merged into its base

Nothing in a pickle is executed. The import is all or nothing: the folder is written under another name and renamed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.errors import one_line
from pbe.model.adapter import LORA_FILE, MAPPER_FILE, load_adapted, read_adapter
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone, clip_tensors
from pbe.model.folder import STEM, STEMS, is_adapter
from pbe.model.ldm import IMAGE_PX, LdmParts, ldm_parts
from pbe.model.tensors import WeightsError, check_fit, read_folder, read_tensors, weight_files_of
from pbe.model.unet import ConditionedUNet
from pbe.model.vae import KlCodec
from pbe.model.weights import MAPPER_PARTS, REFERENCE_PAD_PX, Model, load_model, new_folder, save_model

ALPHAS_TOLERANCE = 1e-3  # between two ways to compute the schedule; the rounding of the file's type comes on top
_LAYOUT = ("unet", "image_encoder", "vae", "codec", "scheduler", "feature_extractor", "model_index.json", "pbe.json")
_PARTS = {"unet": "unet", "backbone": "image encoder: backbone", "mapper": "image encoder: mapper", "vae": "vae"}


class ImportRefusedError(WeightsError):
    """The source cannot be imported, or --out cannot be written; the message says which and why."""


@dataclass(frozen=True)
class Imported:
    """Result of an import. Missing or unexpected tensors raise, so it has none."""

    kind: str
    sha256: dict[str, str]  # by weight file, relative to the source
    found: dict[str, int]  # tensors of the source by part: unet, backbone, mapper, vae
    left_out: dict[str, int]  # tensors, or files of a folder, by family
    notes: tuple[str, ...] = field(default=())


def import_weights(source: Path, out: Path, *, base: Path | None = None) -> Imported:
    """Read `source` and write the folder `out`, which must be new or empty.

    base: of an adapter, the model folder that it was trained on. Raises AdapterError, WeightsError or ModelError.
    """
    _refuse_out(out)
    if is_adapter(source):
        return _import_adapter(source, base, out)
    if base is not None:
        raise ImportRefusedError(f"{source}: not an adapter's folder, so it has no base; leave --base out")
    if source.is_dir():
        return _import_folder(source, out)
    return _import_checkpoint(source, out)


def table_text(imported: Imported) -> str:
    """The text that `pbe import` prints: tensors by part, what was left out, and the source's hashes."""
    lines = [imported.kind, *imported.notes, "", f"{'part':<42} {'found':>7} {'missing':>8} {'unexpected':>11}"]
    lines += [f"{_PARTS[part]:<42} {count:>7} {0:>8} {0:>11}" for part, count in imported.found.items()]
    if imported.left_out:
        lines += ["", f"{'left out':<50} {'number':>7}"]
        lines += [f"{family:<50} {count:>7}" for family, count in sorted(imported.left_out.items())]
    lines += ["", *(f"sha256 {digest}  {name}" for name, digest in imported.sha256.items())]
    return "\n".join(lines)


def _import_checkpoint(source: Path, out: Path) -> Imported:
    tensors = read_tensors(source)
    try:
        parts = ldm_parts(tensors, str(source))
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ImportRefusedError(f"{source}: its tensors do not match each other ({reason})") from error
    if parts.encoder is not None:
        _refuse_schedule(tensors, source)
    sha256 = _sha256(source)
    if parts.encoder is None:
        kind = "Stable Diffusion 1.x: unet/ and vae/, to start training from"
        with new_folder(out) as folder:
            _save_stable_diffusion(folder, parts)
    else:
        kind = "Paint by Example"
        model = _model(parts, sha256)
        with new_folder(out) as folder:
            save_model(folder, model)
    return Imported(kind, {source.name: sha256}, parts.found, parts.left_out, parts.notes)


def _model(parts: LdmParts, sha256: str) -> Model:
    assert parts.encoder is not None
    exemplar, clip = parts.encoder
    backbone = ClipBackbone(clip, digest=sha256[:16])
    card = ModelCard(
        image_px=IMAGE_PX,
        reference_px=backbone.input_px,
        reference_pad_px=REFERENCE_PAD_PX,
        tokens="class",
        scheduler=scheduler_config("scaled_linear", "eps"),
        run={},
    )
    return Model(ConditionedUNet(parts.unet, exemplar), KlCodec(parts.vae, digest=sha256[:16]), backbone, card)


def _save_stable_diffusion(folder: Path, parts: LdmParts) -> None:
    """Write with diffusers, in float32 like everything that pbe writes."""
    parts.unet.float().save_pretrained(folder / "unet")
    parts.vae.float().save_pretrained(folder / "vae")


def _refuse_schedule(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Reject a checkpoint trained with another noise schedule: sampling with ours would give noise."""
    got, ours = tensors.get("alphas_cumprod"), alphas_cumprod(scheduler_config("scaled_linear", "eps"))
    if got is None:
        return
    tolerance = ALPHAS_TOLERANCE + (torch.finfo(got.dtype).eps / 2 if got.is_floating_point() else 0)
    if not (got.shape == ours.shape and (got.float() - ours).abs().max() < tolerance):
        raise ImportRefusedError(
            f"{source}: its noise schedule (alphas_cumprod) is not Stable Diffusion's 0.00085 to 0.012 in 1000 steps"
        )


def _import_adapter(source: Path, base: Path | None, out: Path) -> Imported:
    said = read_adapter(source)
    if base is None:
        raise ImportRefusedError(f"{source}: an adapter of {said.base.name}; name that model's folder by --base")
    model = load_adapted(source, base)
    with new_folder(out) as folder:
        save_model(folder, model)
    sha256 = {name: _sha256(source / name) for name in (LORA_FILE, MAPPER_FILE)}
    found = {"unet": len(model.network.unet.state_dict()), "mapper": len(model.network.exemplar.state_dict())}
    return Imported("Paint by Example", sha256, found, {}, (f"LoRA of rank {said.lora.rank}, merged into {base}",))


def _import_folder(source: Path, out: Path) -> Imported:
    if (source / "unet").is_dir() and not (source / "image_encoder").is_dir():
        raise ImportRefusedError(
            f"{source}: no image_encoder in it, so it is not Paint by Example; "
            "Stable Diffusion in diffusers' layout needs no import"
        )
    model = load_model(source)
    encoder = read_folder(source / "image_encoder", *STEMS)
    backbone = clip_tensors(model.backbone.network.state_dict()) if isinstance(model.backbone, ClipBackbone) else {}
    found = {
        "unet": len(model.network.unet.state_dict()),
        "backbone": len(backbone),
        "mapper": len(model.network.exemplar.state_dict()),
    }
    # load_model ignores unknown tensors of this file
    flat = {name.removeprefix("model.").removeprefix("vision_model."): value for name, value in encoder.items()}
    counters = [name for name in flat if name.endswith("position_ids")]
    rest = {name: v for name, v in flat.items() if name not in counters and not name.startswith(MAPPER_PARTS)}
    check_fit(backbone, rest, f"{source}/image_encoder: CLIP")
    left_out = {"position_ids (a counter in CLIP)": len(counters)} if counters else {}
    files = weight_files_of(source / "unet", STEM) + weight_files_of(source / "image_encoder", *STEMS)
    if isinstance(model.codec, KlCodec):
        found["vae"] = len(model.codec.vae.state_dict())
        files += weight_files_of(source / "vae", STEM)
    for entry in sorted(source.iterdir()):
        if entry.name not in _LAYOUT and not entry.name.startswith("."):
            inside = sum(path.is_file() for path in entry.rglob("*")) if entry.is_dir() else 1
            left_out[f"{entry.name}{'/' if entry.is_dir() else ''} (files)"] = inside
    sha256 = {path.relative_to(source).as_posix(): _sha256(path) for path in files}
    with new_folder(out) as folder:
        save_model(folder, model)
    return Imported("Paint by Example", sha256, found, left_out)


def _refuse_out(out: Path) -> None:
    """Check --out first, before any long work."""
    if out.is_dir() and any(out.iterdir()):
        raise ImportRefusedError(f"--out {out}: this folder is not empty; name a new one")
    if out.exists() and not out.is_dir():
        raise ImportRefusedError(f"--out {out}: this is a file; name a new folder")
    if not out.absolute().parent.is_dir():
        raise ImportRefusedError(f"--out {out}: there is no folder {out.parent}; create it first")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
