"""The number format that networks compute in on a GPU, where they are not trained; training has `train.precision`.

fp32   IEEE float32 throughout, as upstream trains. Left alone, torch runs convolutions in TF32 on Ampere and newer.
tf32   float32 storage; matrix products and convolutions round their inputs to TF32's 10 bits of mantissa.
bf16   weights and activations in bfloat16: 7 bits of mantissa, half the memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions of this process run in TF32, or in IEEE float32. Needs no GPU;
    on the CPU it changes nothing. What was set before is restored."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
