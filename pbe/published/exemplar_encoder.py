"""The image encoder of a Paint by Example folder: CLIP's class token, then the exemplar mapper. By pbe.

Its tensors have the names of diffusers' former PaintByExampleImageEncoder (Apache-2.0), which this file replaces.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, CLIPVisionConfig, CLIPVisionModel


class ExemplarMapper(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True) for _ in range(blocks)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class ExemplarEncoder(CLIPPreTrainedModel):
    """Normalised pixels (B, 3, R, R) to context tokens (B, 1, projection_dim). `uncond_vector` is the context of no
    exemplar."""

    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.model = CLIPVisionModel(config)
        self.mapper = ExemplarMapper(config.hidden_size, (config.num_hidden_layers + 1) // 5)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.projection_dim)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, config.projection_dim))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        token = self.model(pixel_values=pixel_values).pooler_output[:, None]
        return self.proj_out(self.final_layer_norm(self.mapper(token)))
