"""Guards against NaN and infinity that let the GPU work on while they look.

Reading a value of the GPU makes the CPU wait until the GPU has computed it; meanwhile nothing new is queued. So a value
that a guard needs is copied to the CPU as soon as it exists, behind the kernels that make it, and read only after more
work has been queued: the count of broken losses after the step's last backward, the gradient's norm after the next
step's last backward or before anything is logged or saved.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class OnHost:
    """A scalar tensor on its way to the CPU. Making it does not wait for the device; `read` does, if it must."""

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._value = value.detach().clone()  # the caller's tensor may change before it is read

    def read(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


def count_non_finite(losses: Sequence[Tensor]) -> OnHost:
    """How many of the losses, over all ranks, are NaN or infinite. losses: (B,) each. Collective."""
    broken = (~torch.cat(list(losses)).isfinite()).sum()
    dist.all_reduce(broken)
    return OnHost(broken)
