"""Precision of inference on a GPU. Training has its own setting, `train.precision`.

fp32   IEEE float32 throughout, as upstream trains. Left alone, torch runs convolutions in TF32 on Ampere and newer.
tf32   float32 storage; matrix products and convolutions round their inputs to TF32's 10 bits of mantissa.
bf16   weights and activations in bfloat16: 7 bits of mantissa, half the memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Within the block, this process computes float32 matrix products and convolutions in TF32 or in IEEE float32.

    It then restores the previous setting. It works without a GPU and has no effect on the CPU.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
