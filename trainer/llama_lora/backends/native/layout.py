"""How a model is divided over the workers: a mesh of (data, shard, tensor), and the wrappers of each dimension.

- data: copies of everything; gradients are summed
- shard: FSDP2 shards base weights, adapter and optimizer over these workers (torch.distributed.fsdp.fully_shard)
- tensor: neighbouring workers compute parts of each linear layer (Shoeybi et al. 2019, "Megatron-LM", section 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from genvalues.accelerators.architectures import LINEAR
from llama_lora.backends.native.model import SummedLoss
from llama_lora.config import ActivationCheckpointing, Parallelism

DATA, SHARD, TENSOR = "data", "shard", "tensor"
ROW_WISE = ("o_proj", "down_proj")  # split by inputs; the other linear layers of a decoder layer by outputs


@dataclass(frozen=True)
class Layout:
    """The mesh of all workers. A worker's rows depend on its data rank: the workers of a tensor group share rows."""

    mesh: DeviceMesh

    @property
    def data_size(self) -> int:
        return self.mesh[DATA].size() * self.mesh[SHARD].size()

    @property
    def data_rank(self) -> int:
        return self.mesh[DATA].get_local_rank() * self.mesh[SHARD].size() + self.mesh[SHARD].get_local_rank()

    @property
    def tensor_size(self) -> int:
        return self.mesh[TENSOR].size()

    @property
    def sharded(self) -> bool:
        return self.mesh[SHARD].size() > 1


def make_layout(device_type: str, parallelism: Parallelism) -> Layout:
    """Make the mesh. Every worker must call this at the same time: it creates process groups."""
    shard, tensor = parallelism.shard_size, parallelism.tensor_parallel_size
    shape = (parallelism.data_parallel_size // shard, shard, tensor)
    return Layout(init_device_mesh(device_type, shape, mesh_dim_names=(DATA, SHARD, TENSOR)))


def parallelize(
    root: SummedLoss, layout: Layout, recompute: ActivationCheckpointing, compile_backend: str | None
) -> None:
    """Divide a model, in this order: tensor parallel, compile, recompute, shard.

    FSDP gathers the parameters of a layer outside its graph. What is recomputed is a graph that runs again, so that
    torch.utils.checkpoint restores the state of the random numbers for its dropout: within a graph PyTorch can do that
    on a few devices only (run_and_save_rng_state in torch/_prims/rng_prims.py).
    """
    layers = root.lm.model.layers
    if layout.tensor_size > 1:
        for layer in layers:
            split_linear_layers(layer, layout.mesh[TENSOR])
    for index, layer in enumerate(layers):
        if compile_backend is not None:
            for module in [layer.self_attn, layer.mlp] if recompute == "selective" else [layer]:
                module.compile(backend=compile_backend, fullgraph=True, dynamic=False)
        if recompute == "full":
            layers[index] = checkpoint_wrapper(layer)
        elif recompute == "selective":
            layer.self_attn = checkpoint_wrapper(layer.self_attn)
    if layout.sharded:
        replicated = layout.mesh[DATA].size() > 1
        mesh = layout.mesh[DATA, SHARD] if replicated else layout.mesh[SHARD]
        for module in [*layers, root]:
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            # Sums: the loss is divided by the trained tokens of all workers. Not every device reduces to an average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def split_linear_layers(layer: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Split the linear layers of a decoder layer over a tensor-parallel group, with their LoRA factors.

    With q, k, v, gate and up split by outputs, B is split like the base weight and A is replicated. With o and down
    split by inputs, A is split and B is replicated. PEFT's own plan fails on the latter: its factor A keeps the number
    of inputs of the whole layer (peft 0.21 with transformers' tp_plan).
    """
    for name, module in list(layer.named_modules()):
        kind = name.rsplit(".", 1)[-1]
        if kind not in LINEAR:
            continue
        style, factor = (RowwiseParallel, "lora_A") if kind in ROW_WISE else (ColwiseParallel, "lora_B")
        adapted = hasattr(module, "base_layer")
        plan = {"base_layer": style(), f"{factor}.default": style()} if adapted else style()
        parallelize_module(module, mesh, plan, src_data_rank=None)  # no weights yet: nothing to broadcast
