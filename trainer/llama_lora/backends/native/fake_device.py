"""A device "neuron" that does not exist: operators on it have shapes, dtypes and devices, but no values and no memory.

It consists of PyTorch's device for other vendors (PrivateUse1) under the name neuron, fake tensors (PyTorch docs, "Fake
tensor") and a process group of any size that transfers nothing. A tensor on another device and an operator whose shape
depends on data raise an error, as they would fail or be slow on the device. Everything that this takes and PyTorch does
not document stands in this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed import fake_pg
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from llama_lora.backends.native import layout
from llama_lora.backends.native.devices import Device

NAME = "neuron"
COLLECTIVES = "fake_neuron"
PRIVATE_USE_1 = 20  # c10::DeviceType::PrivateUse1


class FakeDevice(Device):
    """The device of an engine; it runs every operator."""

    def fallback_operators(self) -> list[str]:
        return []

    def clear_fallback_operators(self) -> None:
        pass


class InOrder:
    """A stream or event of a device that executes everything in order."""

    stream_id, device_index, device_type = 0, 0, PRIVATE_USE_1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: InOrder) -> None:
        pass

    def wait_event(self, _: InOrder) -> None:
        pass

    def record_event(self, _: InOrder | None = None) -> InOrder:
        return self

    def record(self, _: InOrder | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class DeviceModule(_DummyBackendModule):
    """``torch.neuron``: what FSDP asks a device for."""

    Stream = Event = InOrder

    def set_device(self, device: Any) -> None:
        pass

    def current_stream(self, device: Any = None) -> InOrder:
        return InOrder()

    def stream(self, stream: InOrder) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Register the device and its collectives, once in a process."""
    if torch._C._get_privateuse1_backend_name() == NAME:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule())
    dist.Backend.register_backend(COLLECTIVES, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", NAME])


@contextlib.contextmanager
def opened(world: int, rank: int) -> Iterator[FakeTensorMode]:
    """Run as one of ``world`` workers on the device. Tensors are fake."""
    register()
    dist.init_process_group(COLLECTIVES, rank=rank, world_size=world, store=fake_pg.FakeStore())
    try:
        with real_ranks(), device_attention(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def real_ranks() -> Iterator[None]:
    """Have meshes of workers compute with values: they hold tensors of ranks, which are sliced, and joined by FSDP."""
    concatenate = staticmethod(with_values(DeviceMesh._concatenate))
    with (
        patch.object(layout, "init_device_mesh", with_values(layout.init_device_mesh)),
        patch.object(DeviceMesh, "__getitem__", with_values(DeviceMesh.__getitem__)),
        patch.object(DeviceMesh, "_concatenate", concatenate),
    ):
        yield


def with_values(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return wrapper


FLASH_LENGTH, FLASH_HEAD = 512, 128  # lengths are multiples of the one; heads are not larger than the other


@contextlib.contextmanager
def device_attention() -> Iterator[None]:
    """Choose the kernel of scaled_dot_product_attention, as a device does in C++, which a fake one cannot.

    TorchNeuron has a flash kernel behind PyTorch's operator for other vendors' kernels, for no mask, no dropout,
    lengths that are multiples of 512 and heads of at most 128 numbers. Everything else is computed with whole scores
    (PyTorch's math path), which is also what PyTorch does by default on a device of another vendor.
    """
    default = F.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        lengths, head = (query.shape[-2], key.shape[-2]), query.shape[-1]
        if attn_mask is None and not dropout_p and head <= FLASH_HEAD and not any(n % FLASH_LENGTH for n in lengths):
            kernel = torch.ops.aten._scaled_dot_product_fused_attention_overrideable
            result: torch.Tensor = kernel(query, key, value, is_causal=is_causal, scale=scale)[0]
            return result
        options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return default(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield


def host_values() -> contextlib.AbstractContextManager[Any]:
    """Compute on the host with values, outside the fake device."""
    return unset_fake_temporarily()
