"""The exemplar mapper: features of a frozen backbone to context tokens, with a learned unconditional vector.

    (B, T, width)  ->  N blocks: x + attn(LN x), then x + mlp(LN x)  ->  LayerNorm  ->  Linear to context_width

Source: paper section 3.3 (bottleneck: T = 1, the class token alone); upstream ldm/modules/encoders/modules.py, xf.py.
Parameter names are those of diffusers' `PaintByExampleImageEncoder` without its `model.*`, the backbone. The paper:
width 1024, 5 blocks, 1 head, context 768. With one token a block is a deep MLP: softmax over one key is 1, so the
gradients of queries and keys are zero (upstream issue 14).
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class StandardisedProjection(nn.Module):
    """Standardises features over training references, then maps them linearly to the mapper's width.

    Ours, for backbones wider than the mapper (sample profile). The paper needs none: CLIP's class token comes out of a
    LayerNorm, and the mapper has its width.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(width_in))
        self.register_buffer("feature_std", torch.ones(width_in))
        self.linear = nn.Linear(width_in, width_out)

    def set_statistics(self, tokens: Tensor) -> None:
        """Take mean and std from tokens (N, width_in) of training references. The std is at least 0.05."""
        self.feature_mean.copy_(tokens.mean(0))
        self.feature_std.copy_(tokens.std(0, correction=min(1, len(tokens) - 1)).clamp_min(0.05))

    def forward(self, tokens: Tensor) -> Tensor:
        standardised = (tokens - self.feature_mean) / self.feature_std  # buffers stay float32 in a bfloat16 network
        return self.linear(standardised.to(self.linear.weight.dtype))


class Mapper(nn.Module):
    """A stack of transformer blocks, under diffusers' name `mapper.blocks`."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True) for _ in range(blocks)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class ExemplarMapper(nn.Module):
    """The trainable part of the condition: tokens (B, T, backbone_width) to (B, T, context_width)."""

    def __init__(self, *, backbone_width: int, mapper_width: int, mapper_blocks: int, context_width: int) -> None:
        super().__init__()
        self.projection = (
            StandardisedProjection(backbone_width, mapper_width) if backbone_width != mapper_width else None
        )
        self.mapper = Mapper(mapper_width, mapper_blocks)
        self.final_layer_norm = nn.LayerNorm(mapper_width)
        self.proj_out = nn.Linear(mapper_width, context_width)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, context_width))

    def set_statistics(self, tokens: Tensor) -> None:
        """Standardise by tokens (N, backbone_width) of training references; no effect without a projection."""
        if self.projection is not None:
            self.projection.set_statistics(tokens)

    def forward(self, tokens: Tensor, drop_condition: Tensor) -> Tensor:
        """Tokens (B, T, backbone_width) to context (B, T, context_width).

        drop_condition: (B,) bool; True replaces all tokens of a row by the unconditional vector. Deviation: upstream
        drops whole batches; dropping rows keeps every parameter in every graph.
        """
        if self.projection is not None:
            tokens = self.projection(tokens)
        context = self.proj_out(self.final_layer_norm(self.mapper(tokens)))
        return torch.where(drop_condition[:, None, None], self.uncond_vector.to(context.dtype), context)


class CaptionContext(nn.Module):
    """In the mapper's place, for captions: the text encoder's tokens are the context, as in Stable Diffusion.

    Nothing is trained. The unconditional context is the empty caption's tokens.
    """

    empty_tokens: Tensor

    def __init__(self, *, tokens: int, context_width: int) -> None:
        super().__init__()
        self.register_buffer("empty_tokens", torch.zeros(1, tokens, context_width))

    def set_empty(self, tokens: Tensor) -> None:
        """Take the tokens (1, T, context_width) of the empty caption."""
        self.empty_tokens.copy_(tokens)

    def forward(self, tokens: Tensor, drop_condition: Tensor) -> Tensor:
        """Tokens (B, T, context_width) as they are, or the empty caption's where drop_condition (B,) is True."""
        return torch.where(drop_condition[:, None, None], self.empty_tokens.to(tokens.dtype), tokens)
