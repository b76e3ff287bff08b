"""diffusers' own PaintByExamplePipeline around one of our models: what sampling here is compared with.

The pipeline has been deprecated since diffusers 0.34 and may go; who imports this file skips where it is gone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder, PaintByExamplePipeline
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from pbe.model.clip import ClipBackbone
from pbe.model.vae import KlCodec
from pbe.model.weights import Model


def pipeline_of(model: Model, scheduler: SchedulerMixin) -> PaintByExamplePipeline:
    """UNet and VAE are the model's own modules, the image encoder is diffusers' class with equal tensors."""
    assert isinstance(model.backbone, ClipBackbone) and isinstance(model.codec, KlCodec)
    encoder = PaintByExampleImageEncoder(model.backbone.config)
    clip = {f"model.{name}": value for name, value in model.backbone.network.state_dict().items()}
    encoder.load_state_dict(clip | model.network.exemplar.state_dict())
    side_px = model.backbone.input_px
    pipeline = PaintByExamplePipeline(
        vae=model.codec.vae,
        image_encoder=encoder.eval(),
        unet=model.network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": side_px}, crop_size={"height": side_px, "width": side_px}
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Condition:
    """What the UNet sees besides the noisy latent, rows as in `sample`: (R, 4, h, w), (R, 1, h, w), (R, T, width)."""

    masked_latent: Tensor
    keep_mask_latent: Tensor
    context: Tensor


@contextmanager
def conditions_seen(unet: UNet2DConditionModel) -> Iterator[list[Condition]]:
    """The condition of every forward while it is open."""
    seen: list[Condition] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        channels, context = args[0].clone(), kwargs["encoder_hidden_states"].clone()
        seen.append(Condition(channels[:, 4:8], channels[:, 8:], context))

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
