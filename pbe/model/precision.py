"""Number formats of inference. Training has its own setting, `train.precision`.

float32, fp32    IEEE float32 throughout, as upstream trains. Left alone, torch runs convolutions in TF32 on Ampere and
                 newer.
tf32             float32 storage; matrix products and convolutions round their inputs to TF32's 10 bits of mantissa. It
                 has no effect on the CPU.
bfloat16, bf16   weights and activations in 16 bits, 7 of mantissa: half the memory, and float32's range.
float16          weights and activations in 16 bits, 10 of mantissa: half the memory, but values end at 65504.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pbe.model.settings import EditDtype

TORCH_DTYPES: dict[EditDtype, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def default_dtype(device: torch.device) -> EditDtype:
    """float32; on a GPU bfloat16, which cannot overflow, or float16 where the GPU only emulates bfloat16."""
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


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
