"""Weight folders of the real layouts, tiny and random: Stable Diffusion 1.x, CLIP, Paint by Example.

Same classes, same file names, same keys as the published ones; only smaller. What they compute means nothing.
`python -m tests.tiny_weights FOLDER` writes what the paper-tiny profile names.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2Transformer2DModel,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

from pbe.data.images import resize
from pbe.data.schema import LpipsNet
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.evaluate.features.clip import load_clip_extractor
from pbe.evaluate.metrics.mixture import Mixture, save_mixture
from pbe.model.card import ModelCard
from pbe.model.clip import ClipBackbone, new_clip
from pbe.model.exemplar import CaptionContext, ExemplarMapper
from pbe.model.text import TextEncoder
from pbe.model.unet import ConditionedUNet
from pbe.model.vae import KlCodec
from pbe.model.weights import Model, save_model

CONTEXT_WIDTH, CLIP_WIDTH, CLIP_LAYERS, REFERENCE_PX, IMAGE_PX = 24, 64, 9, 28, 32
EXTRACTOR_PX, EXTRACTOR_WIDTH = 32, 12
CAPTION_TOKENS = 40
UNET = {
    "sample_size": IMAGE_PX // 8,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": 8,
}


N = TypeVar("N", bound=torch.nn.Module)


def lively(module: N, seed: int, scale: float = 0.05) -> N:
    """Every parameter gets a say: some layers start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_unet(in_channels: int = 4, seed: int = 1) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lively(UNet2DConditionModel(in_channels=in_channels, **UNET), seed)


def tiny_vae(width: int = 8, norm_groups: int = 4) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderKL(
            block_out_channels=(width,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=norm_groups,
            layers_per_block=1,
            sample_size=IMAGE_PX,
            scaling_factor=0.18215,
        ).eval()


def tiny_clip() -> CLIPVisionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=CLIP_LAYERS,
            num_attention_heads=CLIP_WIDTH // 64,
            image_size=REFERENCE_PX,
            patch_size=7,
            projection_dim=CONTEXT_WIDTH,
        )
        return lively(new_clip(config), 3)


def tiny_text_encoder() -> TextEncoder:
    """CLIP's text model, with its tokenizer of bytes alone: each letter is a token."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        config = CLIPTextConfig(
            hidden_size=CONTEXT_WIDTH,
            intermediate_size=2 * CONTEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CAPTION_TOKENS,
            vocab_size=len(words),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return TextEncoder(lively(CLIPTextModel(config), 8), tokenizer)


def tiny_exemplar() -> ExemplarMapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return ExemplarMapper(
            backbone_width=CLIP_WIDTH,
            mapper_width=CLIP_WIDTH,
            mapper_blocks=(CLIP_LAYERS + 1) // 5,
            context_width=CONTEXT_WIDTH,
        ).eval()


def paper_model() -> Model:
    """All parts of the paper's path."""
    return Model(
        ConditionedUNet(tiny_unet(in_channels=9), tiny_exemplar()),
        KlCodec(tiny_vae(), digest="tiny"),
        ClipBackbone(tiny_clip(), digest="tiny"),
        ModelCard(IMAGE_PX, REFERENCE_PX, 10, "class", scheduler_config("scaled_linear", "eps"), run={}),
    )


def text_model() -> Model:
    """The paper's path, conditioned on captions."""
    encoder = tiny_text_encoder()
    context = CaptionContext(tokens=encoder.token_count, context_width=encoder.width)
    context.set_empty(encoder([""]))
    card = replace(paper_model().card, condition="text")
    return replace(
        paper_model(), network=ConditionedUNet(tiny_unet(in_channels=9), context), backbone=encoder, card=card
    )


def mapper_of(model: Model) -> ExemplarMapper:
    assert isinstance(model.network.exemplar, ExemplarMapper)
    return model.network.exemplar


def vae_of(model: Model) -> AutoencoderKL:
    assert isinstance(model.codec, KlCodec)
    return model.codec.vae


def clip_backbone_of(model: Model) -> ClipBackbone:
    assert isinstance(model.backbone, ClipBackbone)
    return model.backbone


def clip_of(model: Model) -> CLIPVisionModel:
    return clip_backbone_of(model).network


def state_of(model: Model) -> dict[str, torch.Tensor]:
    """Every tensor of the model."""
    parts = {"network": model.network, "codec": model.codec, "backbone": model.backbone}
    out: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        assert isinstance(module, torch.nn.Module), part
        out |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return out


def write_stable_diffusion(folder: Path) -> Path:
    """As CompVis/stable-diffusion-v1-4 in diffusers' layout, with the parts that matter here."""
    tiny_unet().save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def write_inpainting(folder: Path, *, withholds_above: float = 1.1) -> Path:
    """As stable-diffusion-v1-5/stable-diffusion-inpainting: 9 channels into the UNet. withholds_above: a cosine, of its
    safety checker."""
    return _write_pipeline(folder, tiny_unet(in_channels=9), withholds_above)


def write_text_to_image(folder: Path) -> Path:
    """As CompVis/stable-diffusion-v1-4, whole."""
    return _write_pipeline(folder, tiny_unet(), 1.1)


def _write_pipeline(folder: Path, unet: UNet2DConditionModel, withholds_above: float) -> Path:
    text = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=2 * CONTEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(_VOCABULARY) - 2,
        eos_token_id=len(_VOCABULARY) - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        encoder = lively(CLIPTextModel(text), 8, scale=0.3)  # random words then differ enough to be told apart
        checker = _tiny_safety_checker(withholds_above)
    StableDiffusionInpaintPipeline(
        vae=tiny_vae(),
        text_encoder=encoder,
        tokenizer=_tiny_tokenizer(folder.with_name(f"{folder.name}-words")),
        unet=unet,
        scheduler=PNDMScheduler.from_config(scheduler_config("scaled_linear", "eps")),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": REFERENCE_PX}, crop_size={"height": REFERENCE_PX, "width": REFERENCE_PX}
        ),
    ).save_pretrained(folder)
    for part, prefix in (("text_encoder", "text_model."), ("safety_checker", "vision_model.")):
        _as_published(folder / part / "model.safetensors", prefix)
    return folder


def _as_published(file: Path, prefix: str) -> None:
    """The names of transformers 4, one level deeper, and the counter that old files carry."""
    tensors = load_file(file)
    deeper = "vision_model." + prefix if prefix == "vision_model." else prefix
    is_inner = [name for name in tensors if name.startswith(("embeddings.", "encoder.", "final_layer_norm.", prefix))]
    for name in is_inner:
        tensors[deeper + name.removeprefix(prefix)] = tensors.pop(name)
    tensors[f"{deeper}embeddings.position_ids"] = torch.arange(77 if prefix == "text_model." else 17)[None]
    save_file(tensors, file, metadata={"format": "pt"})


_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
_VOCABULARY = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]


def _tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, which knows letters and joins none."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(_VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(folder / "merges.txt"), model_max_length=77)


def _tiny_safety_checker(withholds_above: float) -> StableDiffusionSafetyChecker:
    vision = tiny_clip().config.to_dict()
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=CONTEXT_WIDTH))
    # a picture is withheld where its cosine to one of the concepts is above the concept's weight
    checker.concept_embeds_weights.data.fill_(withholds_above)
    checker.special_care_embeds_weights.data.fill_(1.1)
    checker.concept_embeds.data = torch.randn(checker.concept_embeds.shape)  # ones are no direction that pictures share
    return checker.eval()


def write_klein(folder: Path) -> Path:
    """As black-forest-labs/FLUX.2-klein-4B, whole: of its text encoder, layers 9, 18 and 27 are read."""
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir(parents=True, exist_ok=True)
    vocabulary = {letter: number for number, letter in enumerate([*_LETTERS, "\u0120", "<|endoftext|>"])}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(str(words / "vocab.json"), str(words / "merges.txt"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=IMAGE_PX,
        )
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
        Flux2KleinInpaintPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=Qwen3ForCausalLM(text).eval(),
            tokenizer=tokenizer,
            transformer=lively(transformer, 9),
        ).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """As openai/clip-vit-large-patch14, which has a text model beside the vision model; old, nested names."""
    folder.mkdir(parents=True)
    network = tiny_clip()
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": v for name, v in network.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    text = tiny_text_encoder()
    tensors |= {f"text_model.{name.removeprefix('text_model.')}": v for name, v in text.network.state_dict().items()}
    text.tokenizer.save_pretrained(folder)
    tensors["logit_scale"] = torch.zeros(())
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    parts = {"vision_config": network.config.to_dict(), "text_config": text.network.config.to_dict()}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **parts}))
    return folder


def write_paint_by_example(folder: Path) -> Path:
    """As this project exports it."""
    save_model(folder, paper_model())
    return folder


def write_clip_extractor(folder: Path) -> Path:
    """As openai/clip-vit-base-patch32: the vision model with its projection, which the metrics use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=EXTRACTOR_PX,
            patch_size=8,
            projection_dim=EXTRACTOR_WIDTH,
        )
        network = lively(CLIPVisionModelWithProjection(config), 5, scale=0.2)
        network.visual_projection.weight.data *= 0.01  # small features: their likelihood is then above 0, as CLIP's is
    tensors = {}
    for name, value in network.state_dict().items():
        inner = name.removeprefix("vision_model.").removeprefix("vision_model.")
        tensors[name if name.startswith("visual_projection") else f"vision_model.{inner}"] = value.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config.to_dict()}))
    return folder


def write_mixture(path: Path, extractor: Path) -> Path:
    """As `pbe import-mixture` writes the published mixture: over the extractor's features of smooth pictures."""
    rng = np.random.default_rng(6)
    pictures = [resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), width_px=48, height_px=48) for _ in range(48)]
    features = load_clip_extractor(extractor)(pictures, batch_rows=16)
    means, roots = features[:3], np.stack([np.diag(1 / (2 * features.std(0)))] * 3)
    save_mixture(path, Mixture(np.array([0.5, 0.3, 0.2]), means, roots, "full"), source_sha256="0" * 64)
    return path


class _Pool3(torch.nn.Module):
    """Stands for TF's Inception, with the call of its published TorchScript file."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        resized = torch.nn.functional.interpolate(img.float(), [75, 75], mode="bilinear", align_corners=False)
        features = torch.relu(self.convolution((resized - 128.0) / 128.0)).mean((2, 3))
        return features if return_features else features.softmax(1)


def write_inception(path: Path) -> Path:
    """As inception-2015-12-05.pt: takes uint8 pictures of any size, gives pool3 with return_features=True."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        torch.jit.script(_Pool3().eval()).save(str(path))
    return path


# side of the filters, input and output channels of torchvision's convolutions, by their index in `features`
_CONVOLUTIONS = {
    "alex": {0: (11, 3, 64), 3: (5, 64, 192), 6: (3, 192, 384), 8: (3, 384, 256), 10: (3, 256, 256)},
    "vgg": {
        index: (3, *widths)
        for index, widths in zip(
            (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
            itertools.pairwise((3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)),
            strict=True,
        )
    },
}
_LPIPS_HEADS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def write_lpips(folder: Path, net: LpipsNet) -> tuple[Path, Path]:
    """The state_dict of torchvision's network and the heads of the original LPIPS, as pickles: random, of full size.

    Drawn by numpy, whose numbers torch's version does not change: golden values depend on them.
    """
    rng = np.random.default_rng(0)
    backbone = {"classifier.1.weight": np.zeros((2, 2), np.float32)}
    for index, (side, narrow, wide) in _CONVOLUTIONS[net].items():
        drawn = rng.standard_normal((wide, narrow, side, side), np.float32)
        backbone[f"features.{index}.weight"] = drawn * np.float32((2 / (narrow * side * side)) ** 0.5)
        backbone[f"features.{index}.bias"] = 0.1 * rng.standard_normal(wide, np.float32)
    heads = {
        f"lin{index}.model.1.weight": rng.random((1, width, 1, 1), np.float32)
        for index, width in enumerate(_LPIPS_HEADS[net])
    }
    files = (folder / f"{net}.pth", folder / f"{net}-heads.pth")
    for arrays, file in zip((backbone, heads), files, strict=True):
        torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, file)
    return files


def write_dino(folder: Path, model_type: Literal["dinov2", "dinov2_with_registers", "vit"] = "dinov2") -> Path:
    """As facebook/dinov2-base, facebook/dinov2-with-registers-base or facebook/dino-vits16, with its preprocessing."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        network: PreTrainedModel
        if model_type == "vit":
            config = ViTConfig(**sizes, intermediate_size=64, image_size=224, patch_size=16)
            network = ViTModel(config, add_pooling_layer=False)
        elif model_type == "dinov2":
            network = Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14))
        else:
            network = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, image_size=70, patch_size=14))
        lively(network, 10).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def write_all(home: Path) -> None:
    """What the paper-tiny profile names below its root."""
    write_text_to_image(home / "sd")
    write_inpainting(home / "inpainting")
    write_klein(home / "klein")
    write_clip(home / "clip")
    write_mixture(home / "mixture.npz", write_clip_extractor(home / "clip-extractor"))
    write_dino(home / "dino")
    write_lpips(home, "alex")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
    print(*sorted(path.name for path in Path(sys.argv[1]).iterdir()))


class _Harmoniser(nn.Module):
    """A convolution over the composite and the mask: the call of kind `harmonise`."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, composite: Tensor, mask: Tensor) -> Tensor:
        return torch.sigmoid(self.convolution(torch.cat([composite, mask], 1)))


def harmoniser(seed: int = 0) -> _Harmoniser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _Harmoniser().eval()


def write_harmoniser(path: Path, *, seed: int = 0) -> Path:
    """As TorchScript."""
    torch.jit.script(harmoniser(seed)).save(str(path))
    return path
