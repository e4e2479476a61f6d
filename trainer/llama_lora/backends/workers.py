"""The workers of a training, and what they tell one another on the host: no part of it is in a device's graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
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
        """What the worker of rank 0 has given."""
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def gathered(self, value: T) -> list[T]:
        """What every worker has given, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def summed(self, numbers: Sequence[float]) -> list[float]:
        """Each number, summed over the workers in fp64."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return list(tensor.tolist())

    def any(self, value: bool) -> bool:
        """Whether any worker's value is true."""
        return bool(self.largest(int(value)))

    def largest(self, number: int) -> int:
        """The largest of the workers' numbers."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)
