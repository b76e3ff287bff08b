"""Rank and world size of this process, and small collectives."""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's place in the process group.

    Read from torch.distributed and from LOCAL_RANK and NODE_RANK (or GROUP_RANK), which Ray Train and torchrun set; a
    single process needs none of them.
    """

    rank: int
    world: int
    node: int
    leads_node: bool  # this rank does what is done once per node: downloads, conversions

    @staticmethod
    def of_this_process() -> "Ranks":
        node = int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0)
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return Ranks(dist.get_rank(), dist.get_world_size(), node, local == 0)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective; for small objects."""
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        """Wait for every rank. Collective. torch's own barrier wants a device under nccl."""
        self.all_gather(None)

    def all_true(self, value: bool) -> bool:
        """Return whether `value` is true on every rank. Collective."""
        return all(self.all_gather(value))
