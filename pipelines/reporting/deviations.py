"""Every known difference from the paper or its official code that holds for given settings, for the report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pbe.config import Params
from pbe.data.filter import FilterConfig
from pbe.train.settings import TrainConfig

PAPER_IMAGE_PX = 512
PAPER_REFERENCE_PX = 224
PAPER_PHOTOS = 1_900_000


@dataclass(frozen=True)
class Deviation:
    """One way in which this run differs from the paper or its code. `variants`: "" when all do."""

    topic: str
    here: str
    original: str
    why: str
    variants: str = ""


_NUMBER_FORMATS = {
    "bf16_autocast": "bfloat16 autocast",
    "bf16": "bfloat16 with float32 master weights",
    "bf16_pure": "bfloat16, AdamW's states too",
}


def deviations(params: Params, *, train_photos: int) -> list[Deviation]:
    """Every known difference from the paper or its official code that holds for these settings, data first."""
    return [*_data_deviations(params, train_photos), *_train_deviations(params), *_evaluate_deviations(params)]


def _data_deviations(params: Params, train_photos: int) -> Iterator[Deviation]:
    cut, encode, kept = params.materialize, params.encode, params.filter
    if train_photos < PAPER_PHOTOS // 2:
        yield Deviation("training photos", f"{train_photos}", "1.9 million of OpenImages", "runs anywhere, in minutes")
    if cut.image_px != PAPER_IMAGE_PX:
        yield Deviation("picture size", f"{cut.image_px} px", f"{PAPER_IMAGE_PX} px", "CPU time")
    if (kept.min_area_frac, kept.max_area_frac) != (0.02, 0.8):
        yield Deviation(
            "box filter", f"area {kept.min_area_frac} to {kept.max_area_frac}", "area 0.02 to 0.8", "a setting"
        )
    if more := _rules_beyond_area(kept):
        yield Deviation("more filter rules", ", ".join(more), "area alone", "a setting")
    for topic, here, original, unit in (
        ("padding of the reference", cut.reference_pad_px, 10, " px"),
        ("growth of the box hole, of the room", cut.box_extend_frac, 0.4, ""),
        ("shrinking of the crop, of what is free", cut.crop_shrink_frac, 0.6, ""),
        ("jitter of a Bezier hole", cut.bezier_jitter_px, 5, " px"),
    ):
        if here != original:
            yield Deviation(topic, f"up to {here:g}{unit}", f"up to {original:g}{unit}", "a setting")
    if cut.reference_px != PAPER_REFERENCE_PX:
        yield Deviation("reference size", f"{cut.reference_px} px", f"{PAPER_REFERENCE_PX} px", "CPU time")
    yield Deviation(
        "crops and holes",
        f"{cut.slots} triplets per photo, cut once, stored as JPEG (quality {cut.jpeg_quality}), read again in turn",
        "cut afresh from the photo in every epoch",
        "the encoders then run once, not in every epoch",
    )
    yield Deviation(
        "shrinking",
        "bilinear down to a quarter, as the original; below it averages areas",
        "bilinear without antialias",
        "no aliasing at small sizes",
    )
    if cut.bezier_points_per_side != 20:
        yield Deviation(
            "points of a Bezier hole",
            f"{cut.bezier_points_per_side} per side",
            "20 per side in the text, 18 in the code",
            "follows the code" if cut.bezier_points_per_side == 18 else "a setting",
        )
    if encode.codec.kind == "patch":
        yield Deviation(
            "image codec",
            f"linear: principal components of {encode.codec.patch_px} px patches, {encode.codec.channels} kept",
            "AutoencoderKL of Stable Diffusion: 8 px, 4 channels",
            "fitted in seconds, no download",
        )
    if encode.backbone.kind != "clip":
        yield Deviation(
            "exemplar encoder",
            f"{encode.backbone.kind}, mean-pooled, ImageNet",
            "CLIP ViT-L/14, class token",
            "comes inside a pip package",
        )


def _rules_beyond_area(kept: FilterConfig) -> list[str]:
    """Settings of the optional rules that are on; `exclude_images` is upstream's too."""
    optional = kept.model_dump(exclude={"min_area_frac", "max_area_frac", "exclude_images"})
    return [f"{name} {value}" for name, value in optional.items() if value]


def _train_deviations(params: Params) -> Iterator[Deviation]:
    trains = {name: params.train_variant(name) for name in params.variants}

    def where(topic: str, here: Callable[[TrainConfig], str | None], original: str, why: str) -> Iterator[Deviation]:
        """One deviation per distinct text of `here`, which is None for a variant that does as the original."""
        texts = {name: here(cfg) for name, cfg in trains.items()}
        for text in dict.fromkeys(texts.values()):
            if text is not None:
                names = [name for name, other in texts.items() if other == text]
                yield Deviation(topic, text, original, why, "" if len(names) == len(texts) else ", ".join(names))

    yield from where(
        "first weights",
        lambda t: {"random": "random", "sd": None}.get(t.init, t.init),
        "Stable Diffusion 1.4",
        "small UNet; no download",
    )
    yield from where("network", _network, "channels 320, 640, 1280, 1280; 2 layers per block; 8 heads", "CPU time")
    yield from where(
        "exemplar mapper",
        _exemplar,
        "five transformer blocks, 1024 wide, to a token of 768",
        "CPU time",
    )
    draws = params.encode.reference_draws
    yield from where(
        "draws of the reference",
        lambda t: None if t.input == "pixels" else f"{draws} per triplet, made once; the first is clean",
        "afresh in every epoch",
        "the encoder then runs once",
    )
    yield from where(
        "tokens of the exemplar",
        lambda t: "all, without the bottleneck" if t.exemplar.tokens == "all" else None,
        "the class token alone",
        "an ablation",
    )
    yield from where(
        "class embedding",
        lambda t: "the exemplar also goes to the time embedding" if t.unet.class_embedding else None,
        "cross-attention alone",
        "seemed to help in one trial; not proven",
    )
    yield from where(
        "objective",
        lambda t: f"the network predicts {t.objective}" if t.objective != "eps" else None,
        "it predicts the noise (eps)",
        "x0 leaves no speckle at this budget, where v did; eps was not tried",
    )
    yield from where(
        "loss weight",
        lambda t: f"min-SNR, at most {t.min_snr_gamma:g}" if t.min_snr_gamma is not None else None,
        "none",
        "a setting",
    )
    yield from where(
        "noise schedule",
        lambda t: t.beta_schedule if t.beta_schedule != "scaled_linear" else None,
        "scaled_linear, 0.00085 to 0.012",
        "chosen for small pictures; not compared",
    )
    yield from where(
        "context dropout",
        lambda t: f"{t.context_dropout_prob:.0%} of rows see none of the photo" if t.context_dropout_prob else None,
        "none",
        "with few photos the model otherwise ignores the reference",
    )
    yield from where(
        "condition dropout",
        lambda t: f"drawn per row, {t.condition_dropout_prob:.0%}" if t.condition_dropout_prob else "none",
        "20 %; the code draws once per batch",
        "every step then trains the unconditional vector",
    )
    yield from where(
        "reference augmentation off",
        lambda t: None if t.reference_augmentation else "references are clean",
        "flip, rotation, blur, elastic transform",
        "an ablation",
    )
    yield from where(
        "hole kinds",
        lambda t: f"{t.bezier_prob:.0%} Bezier" if t.bezier_prob != 0.5 else None,
        "half Bezier, half boxes",
        "a setting",
    )
    yield from where(
        "length",
        lambda t: f"{t.steps} steps of {t.batch}",
        "40 epochs, about 7 days on 64 V100",
        "minutes",
    )
    yield from where(
        "learning rate", _learning_rate, "1e-5 after 10000 warm-up steps, constant", "trained from scratch"
    )
    yield from where(
        "gradient clipping",
        lambda t: None if t.grad_clip is None else f"norm {t.grad_clip:g}",
        "none",
        "guards a high learning rate",
    )
    yield from where(
        "AdamW",
        lambda t: (
            None
            if (t.adam_betas, t.adam_eps, t.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
            else f"betas {t.adam_betas}, eps {t.adam_eps:g}, weight decay {t.weight_decay:g}"
        ),
        "betas (0.9, 0.999), eps 1e-8, weight decay 0.01",
        "set in params.yaml",
    )
    yield from where(
        "number format",
        lambda t: _NUMBER_FORMATS.get(t.precision),
        "float32",
        "speed",
    )


def _exemplar(cfg: TrainConfig) -> str | None:
    mapper, context = cfg.exemplar, cfg.unet.context_width
    if (mapper.mapper_width, mapper.mapper_blocks, context) == (1024, 5, 768):
        return None
    return f"{mapper.mapper_blocks} transformer block(s), {mapper.mapper_width} wide, to a token of {context}"


def _network(cfg: TrainConfig) -> str | None:
    unet = cfg.unet
    if unet.block_channels == (320, 640, 1280, 1280) and (unet.layers_per_block, unet.attention_heads) == (2, 8):
        return None
    attends = [str(level + 1) for level, here in enumerate(unet.attention) if here]
    attention = f"cross-attention at level {', '.join(attends)}" if not all(unet.attention[:-1]) else ""
    return f"channels {', '.join(map(str, unet.block_channels))}; {unet.layers_per_block} layer(s) per block; " + (
        f"{unet.attention_heads} heads" + (f"; {attention}" if attention else "")
    )


def _learning_rate(cfg: TrainConfig) -> str | None:
    if (cfg.lr, cfg.warmup_steps, cfg.final_lr_frac) == (1e-5, 10_000, 1.0):
        return None
    shape = "constant" if cfg.final_lr_frac == 1 else f"cosine down to {cfg.final_lr_frac:.0%} of it"
    return f"{cfg.lr:g} after {cfg.warmup_steps} warm-up steps, {shape}"


def _sampler_deviation(params: Params) -> Iterator[Deviation]:
    cfg, train = params.edit, params.train
    plms = cfg.sampler == "pndm" if cfg.sampler else train.beta_schedule == "scaled_linear" and train.objective != "x0"
    held = ", every predicted picture held to valid pixels" if params.encode.codec.kind == "patch" else ""
    if not plms or held or cfg.steps != 50:
        here = f"{'PLMS' if plms else (cfg.sampler or 'ddim').upper()}, {cfg.steps} steps{held}"
        yield Deviation("sampler", here, "PLMS, 50 steps", "time; PLMS was not compared" if not plms else "time")
    if cfg.protocol == "upstream":
        return
    if params.encode.codec.kind != "patch":  # that one's posterior has no spread
        yield Deviation("latent of the masked photo, in edits", "the posterior's mean", "a sample of it", "less noise")
    yield Deviation(
        "pixels outside the hole",
        "kept exactly: the fill is pasted back",
        "decoded with the rest",
        "an edit stays local",
    )


def _evaluate_deviations(params: Params) -> Iterator[Deviation]:
    yield from _sampler_deviation(params)
    if params.edit.guidance_scale != 5:
        yield Deviation("guidance scale", f"{params.edit.guidance_scale:g}", "5 in the published commands", "a setting")
    bench = params.bench
    if bench.source == "heldout":
        yield Deviation(
            "test set",
            f"own bench from the {bench.split} split; exemplars are the nearest of the same class",
            "COCOEE: 3500 hand-picked pairs",
            "no download" + ("; these photos were seen in training" if bench.split == "train" else ""),
        )
    judges = [judge.kind for judge in params.evaluate.judges]
    if judges != ["clip"]:
        yield Deviation(
            "metrics",
            f"features of {' and '.join(judges)}",
            "features of CLIP ViT-B/32",
            "come inside pip packages; so no number here compares with the paper's tables",
        )
    if params.evaluate.reals is None:
        yield Deviation(
            "what Frechet and QS compare with",
            "untouched crops of the bench's own boxes",
            "all photos of COCO test2017",
            "no download",
        )
    if "clip" in judges and params.evaluate.clip_region == "whole":
        yield Deviation(
            "region of the CLIP score",
            "the whole box of the hole",
            "without its last row and column",
            "off by one there",
        )
