"""What is trained, as `train.trainable` says; the exemplar mapper always is.

    all               every parameter (paper)
    cross_attention   of the UNet, the attention to the exemplar: attn2 of every transformer block. Source:
                      create_custom_diffusion(freeze_model="crossattn") of github.com/adobe-research/custom-diffusion
    {lora: ...}       of the UNet, low-rank updates beside its weights (pbe/model/adapter.py)

Frozen weights have no gradients, moments or float32 masters, and no place in checkpoints: they come from `train.init`.
"""

import torch
from torch import nn

from pbe.model.adapter import add_lora
from pbe.model.architecture import Architecture
from pbe.model.unet import ConditionedUNet, new_network
from pbe.train.settings import LoraTrainable, Trainable

CROSS_ATTENTION = ".attn2."  # in the names of diffusers' parameters


def choose_trainable(network: ConditionedUNet, trainable: Trainable, *, seed: int) -> None:
    """Freeze what is not trained; with LoRA, add the updates, seeded. Raises AdapterError for a layer it lacks."""
    if isinstance(trainable, LoraTrainable):
        add_lora(network.unet, trainable.lora, seed=seed)
    elif trainable == "cross_attention":
        for name, parameter in network.unet.named_parameters():
            parameter.requires_grad_(CROSS_ATTENTION in name)


def parameter_counts(arch: Architecture, trainable: Trainable) -> tuple[int, int]:
    """The number of all parameters, with those that LoRA adds, and of those that have gradients and moments."""
    with torch.device("meta"):
        network = new_network(arch)
    choose_trainable(network, trainable, seed=0)
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def store_frozen_in_bfloat16(network: ConditionedUNet) -> None:
    """Keep frozen weights of matrix products and convolutions in bfloat16: autocast rounds them to it at every use.

    Results stay the same to the bit, in half the memory for these weights and without their rounded copies.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
