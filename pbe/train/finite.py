"""Guards against NaN and infinity that do not stall the GPU.

Reading a GPU value makes the CPU wait for the GPU, and meanwhile nothing new is queued. So a value that a guard needs
is copied to the CPU asynchronously and read only after more work has been queued: the count of non-finite losses after
the step's last backward, the gradient's norm after the next step's last backward or before anything is logged or saved.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class OnHost:
    """A scalar copied to the CPU asynchronously: the constructor does not wait for the device, `read` may."""

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._value = value.detach().clone()  # the caller may change its tensor before `read`

    def read(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


def count_non_finite(losses: Sequence[Tensor]) -> OnHost:
    """The number of losses, over all ranks, that are NaN or infinite. losses: (B,) each. Collective."""
    non_finite = (~torch.cat(list(losses)).isfinite()).sum()
    dist.all_reduce(non_finite)
    return OnHost(non_finite)
