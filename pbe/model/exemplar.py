"""The exemplar condition: frozen backbone features to one context token, with a learned unconditional vector.

Source: paper section 3.3 (bottleneck: the class token alone) and upstream ldm/modules/encoders/modules.py.
Deviation of the sample profile: the mapper is a two-layer MLP on pooled EfficientNet features; the paper has
five decoder blocks on CLIP's class token.
"""

import torch
from torch import Tensor, nn


class ExemplarMapper(nn.Module):
    """Trainable part of the condition: (B, T, backbone_width) tokens to (B, T, context_width)."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, *, backbone_width: int, mapper_width: int, context_width: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(backbone_width))
        self.register_buffer("feature_std", torch.ones(backbone_width))
        self.mapper = nn.Sequential(
            nn.Linear(backbone_width, mapper_width), nn.GELU(), nn.Linear(mapper_width, context_width)
        )
        self.final_layer_norm = nn.LayerNorm(context_width)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, context_width))

    def set_statistics(self, tokens: Tensor) -> None:
        """Standardise with the mean and std of training references, tokens (N, backbone_width)."""
        self.feature_mean.copy_(tokens.mean(0))
        self.feature_std.copy_(tokens.std(0, correction=min(1, len(tokens) - 1)).clamp_min(0.05))

    def forward(self, tokens: Tensor, drop_condition: Tensor) -> Tensor:
        """drop_condition: (B,) bool, True replaces the row's tokens by the unconditional vector.

        Deviation: upstream drops whole batches; per row keeps every parameter in every graph.
        """
        context = self.final_layer_norm(self.mapper((tokens - self.feature_mean) / self.feature_std))
        return torch.where(drop_condition[:, None, None], self.uncond_vector.to(context.dtype), context)
