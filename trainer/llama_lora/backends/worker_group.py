"""Collectives of the workers on the host. They are not part of any device graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerGroup:
    """Collectives over gloo; every worker must take part in each. ``group`` None is the default process group."""

    group: Any = None

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def barrier(self) -> None:
        dist.barrier(self.group)

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return every worker's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over the workers, in fp64."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return list(tensor.tolist())

    def any(self, value: bool) -> bool:
        """Whether any worker's value is true."""
        return bool(self.max(int(value)))

    def max(self, number: int) -> int:
        """The largest of the workers' numbers."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)
