"""The denoiser: diffusers' UNet2DConditionModel on [noisy latent, masked latent, keep mask], with the exemplar mapper.

Channel order and mask polarity are upstream's (ldm/models/diffusion/ddpm.py): noisy latent, masked photo's latent, keep
mask with 1 = known. Stable Diffusion's inpainting model differs in both.
Deviation of the sample profile: a class embedding also feeds the token to the time embedding.
"""

from contextlib import nullcontext

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from pbe.model.architecture import Architecture
from pbe.model.exemplar import CaptionContext, ExemplarMapper


class ConditionedUNet(nn.Module):
    """The UNet and the exemplar mapper, or what stands in its place for captions.

    unet: 2 C + 1 channels in, C out; its cross-attention has the width of the mapper's context.
    """

    def __init__(self, unet: UNet2DConditionModel, exemplar: ExemplarMapper | CaptionContext) -> None:
        super().__init__()
        self.unet = unet
        self.exemplar = exemplar
        self._class_embedding = unet.config.class_embed_type == "projection"
        self._memory_format = torch.contiguous_format
        self._autocast = False

    def use_kernels(self, *, sdpa: bool, channels_last: bool, checkpointed_levels: int) -> None:
        """Choose how the UNet computes; results differ by rounding alone.

        checkpointed_levels: how many levels, the finest first, recompute their activations in the backward pass.
        """
        self.unet.set_attn_processor(AttnProcessor2_0() if sdpa else AttnProcessor())
        if channels_last:  # activations only: DeepSpeed lays out the weights
            self._memory_format = torch.channels_last
        if checkpointed_levels:
            checkpoint_levels(self.unet, checkpointed_levels)

    def use_autocast(self) -> None:
        """Compute `forward` in bfloat16 by autocast.

        Autocast is inside the network, because on a GPU DeepSpeed's engine turns off one around it.
        """
        self._autocast = True

    @property
    def latent_channels(self) -> int:
        return self.unet.config.out_channels

    def forward(
        self,
        noisy_latent: Tensor,
        timestep: Tensor,
        *,
        masked_latent: Tensor,
        keep_mask_latent: Tensor,
        exemplar_tokens: Tensor,
        drop_condition: Tensor,
    ) -> Tensor:
        """The prediction (B, C, h, w); the objective defines what is predicted.

        Latents (B, C, h, w), keep mask (B, 1, h, w) in [0, 1], tokens (B, T, width), drop_condition (B,) bool.
        """
        device = noisy_latent.device.type
        with torch.autocast(device, torch.bfloat16) if self._autocast else nullcontext():
            return self.denoise(
                noisy_latent,
                timestep,
                masked_latent=masked_latent,
                keep_mask_latent=keep_mask_latent,
                context=self.exemplar(exemplar_tokens, drop_condition),
            )

    def denoise(
        self,
        noisy_latent: Tensor,
        timestep: Tensor,
        *,
        masked_latent: Tensor,
        keep_mask_latent: Tensor,
        context: Tensor,
    ) -> Tensor:
        """`forward` with a given context (B, T, context_width), which sampling computes once for all steps."""
        channels = torch.cat([noisy_latent, masked_latent, keep_mask_latent], dim=1)
        channels = channels.contiguous(memory_format=self._memory_format)
        labels = context[:, 0] if self._class_embedding else None
        return self.unet(channels, timestep, encoder_hidden_states=context, class_labels=labels).sample


def checkpoint_levels(unet: UNet2DConditionModel, count: int) -> None:
    """Recompute in the backward pass what the `count` finest levels computed; the middle block is of the coarsest.

    The finest level holds most of the memory, so that recomputing it alone saves most for a part of the time.
    """
    unet.enable_gradient_checkpointing()
    coarsest = len(unet.down_blocks) - 1
    blocks = [*enumerate(unet.down_blocks), (coarsest, unet.mid_block)]
    blocks += [(coarsest - index, block) for index, block in enumerate(unet.up_blocks)]
    for level, block in blocks:
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = level < count


def new_network(arch: Architecture) -> ConditionedUNet:
    """A network with random weights from torch's global generator."""
    cfg = arch.unet
    unet = UNet2DConditionModel(
        sample_size=arch.latent_px,
        in_channels=2 * arch.latent_channels + 1,
        out_channels=arch.latent_channels,
        block_out_channels=cfg.block_channels,
        layers_per_block=cfg.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in cfg.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(cfg.attention)),
        cross_attention_dim=cfg.context_width,
        # diffusers' attention_head_dim is the number of heads for this class
        attention_head_dim=cfg.attention_heads,
        norm_num_groups=cfg.norm_groups,
        class_embed_type="projection" if cfg.class_embedding else None,
        projection_class_embeddings_input_dim=cfg.context_width if cfg.class_embedding else None,
    )
    if arch.caption_tokens is not None:
        return ConditionedUNet(unet, CaptionContext(tokens=arch.caption_tokens, context_width=cfg.context_width))
    exemplar = ExemplarMapper(
        backbone_width=arch.backbone_width,
        mapper_width=arch.exemplar.mapper_width,
        mapper_blocks=arch.exemplar.mapper_blocks,
        context_width=cfg.context_width,
    )
    return ConditionedUNet(unet, exemplar)


def widened(weight: Tensor, in_channels: int) -> Tensor:
    """The weight (out, C, k, k) of a first convolution, extended to `in_channels` by zeros.

    The output stays the same for any input in the new channels (upstream scripts/modify_checkpoints.py).
    """
    out = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    out[:, : weight.shape[1]] = weight
    return out


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm outside autocast: on CPU the bfloat16 kernel took 30 % of a step, the float32 one 6 %."""

    def forward(self, input: Tensor) -> Tensor:  # torch's own argument name
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def use_float32_group_norm(module: nn.Module) -> None:
    """Replace every GroupNorm in place; parameter names and values stay."""
    for name, child in module.named_children():
        if type(child) is nn.GroupNorm:
            norm = Float32GroupNorm(child.num_groups, child.num_channels, eps=child.eps, affine=child.affine)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            use_float32_group_norm(child)
