"""Who this process is among the ranks, and what all of them must decide together."""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Ray Train and torchrun set LOCAL_RANK and NODE_RANK (or GROUP_RANK); one process alone needs neither."""

    rank: int
    world: int
    node: int
    leads_node: bool  # the one that does what a node needs once: downloads, conversions

    @staticmethod
    def of_this_process() -> "Ranks":
        node = int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0)
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return Ranks(dist.get_rank(), dist.get_world_size(), node, local == 0)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective; for small things."""
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        """Wait until every rank is here. Collective; torch's own asks for a device under nccl."""
        self.all_gather(None)

    def all_true(self, value: bool) -> bool:
        """Collective."""
        return all(self.all_gather(value))
