"""A training step on the fake device, and the memory that it would take.

``TracedEngine`` is the engine itself: nothing of the step is written again here.
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_lora.backends.base import TrainingJob
from llama_lora.backends.loop import Row
from llama_lora.backends.native import fake_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.backends.native.model import (
    ModelBatch,
    adapter_parameters,
    allocate,
    base_parameters,
    build_model,
    set_buffers,
)
from llama_lora.backends.native.optimizer import copies
from llama_lora.backends.native.regions import local_tensor
from llama_lora.backends.worker_group import WorkerGroup

TORCH = Path(torch.__file__).parent
MICRO_BATCHES = 3  # the most that a step is traced with
PhaseKey = tuple[str, str, int]  # part of the step, what it computes, and the layer's index (0 for no layer)


@dataclass
class Live:
    """Bytes of storages on the device: those that FSDP gathers parameters into, and all others."""

    gathered: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.gathered + self.other


@dataclass
class Phase:
    """The bytes at the beginning of a phase, and the most in it."""

    what: str
    start: Live
    peak: int
    peak_other: int
    peak_gathered: int


@dataclass
class Known:
    """A storage on the device. The reference keeps its callback alive, not the storage."""

    reference: weakref.ref[torch.UntypedStorage]
    size: int
    gathered: bool


BOOKKEEPING = ("prim", "profiler")  # namespaces of operators that run on no device
# FSDP's operators whose outputs are gathered parameters (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).
GATHERING = ("fsdp.all_gather_copy_in.default", "fsdp.split_with_sizes_copy.default")


class DeviceMonitor(TorchDispatchMode):
    """Watches every operator under autograd and DTensor: its name, devices and the storages that are alive after it.

    torch.distributed._tools.mem_tracker.MemTracker does the like, but stops at a second forward pass, which the probe
    and each micro-batch are, and copies its statistics for every module and operator.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.operators: set[str] = set()
        self.elsewhere: dict[tuple[str, str], str] = {}  # (operator, device) -> place in the code
        self.live = Live()
        self.phases: dict[PhaseKey, Phase] = {}
        self._phase: Phase | None = None
        self._storages: dict[int, Known] = {}
        self._paused = False

    # --- what the engine tells

    def begin(self, key: PhaseKey) -> None:
        start = Live(self.live.gathered, self.live.other)
        self._phase = self.phases[key] = Phase(key[1], start, start.total, start.other, start.gathered)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    # --- what PyTorch tells

    def __enter__(self) -> DeviceMonitor:
        self._resize = torch.UntypedStorage.resize_
        monitor, resize = self, self._resize

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP frees and allocates gathered parameters with it: it is no operator."""
            result = resize(storage, size)
            if known := monitor._storages.get(id(storage)):
                monitor._set_gathered(known)
                monitor._set_size(known, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_and_count
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again, with local tensors
        if func is torch.ops._c10d_functional.wait_tensor.default and active_fake_mode() is self.mode:
            result = args[0]  # on a fake tensor it would return another tensor
        else:
            result = func(*args, **kwargs)
        if active_fake_mode() is self.mode and not self._paused:  # DTensor computes shapes in a mode of its own
            self._observe(func, args, kwargs, result)
        return result

    def _observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace in BOOKKEEPING:
            return
        name = str(func)
        self.operators.add(name)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor, name)
        if name in GATHERING:
            for tensor in tree_leaves((result, kwargs.get("out"))):
                if isinstance(tensor, torch.Tensor):
                    self._set_gathered(self._storages[id(tensor.untyped_storage())])
        if not name.startswith("aten.empty"):  # only the next operator tells whether it is FSDP's buffer
            self._update_peaks()

    def track(self, tensor: torch.Tensor, operator: str) -> None:
        if tensor.device.type != fake_device.NAME:
            if tensor.device.type != "meta":
                found = (operator, tensor.device.type)
                if found not in self.elsewhere:
                    self.elsewhere[found] = place_of(traceback.extract_stack())
            return
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is None:
            key = id(storage)
            known = self._storages[key] = Known(weakref.ref(storage, lambda _: self._forget(key)), 0, False)
        self._set_size(known, storage.nbytes())

    def _forget(self, key: int) -> None:
        self._set_size(self._storages.pop(key), 0)

    def _set_size(self, known: Known, size: int) -> None:
        if known.gathered:
            self.live.gathered += size - known.size
        else:
            self.live.other += size - known.size
        known.size = size

    def _set_gathered(self, known: Known) -> None:
        size = known.size
        self._set_size(known, 0)
        known.gathered = True
        self._set_size(known, size)

    def _update_peaks(self) -> None:
        if self._phase is not None:
            self._phase.peak = max(self._phase.peak, self.live.total)
            self._phase.peak_other = max(self._phase.peak_other, self.live.other)
            self._phase.peak_gathered = max(self._phase.peak_gathered, self.live.gathered)


class TracedEngine(NativeEngine):
    """The engine without weights, on the fake device, with a monitor of its operators."""

    def __init__(self, job: TrainingJob, config: Any, mode: FakeTensorMode, compile_backend: str | None = None) -> None:
        self.config, self.mode = config, mode
        self.monitor = DeviceMonitor(mode)
        self.sizes: dict[str, int] = {}
        self.part = "start"
        # torch.compile compiles nothing under a mode that watches operators.
        self.watching: Any = self.monitor if compile_backend is None else contextlib.nullcontext()
        with self.watching:
            super().__init__(job, fake_device.FakeDevice("neuron"), WorkerGroup(None), compile_backend)
        state = [self.optimizer.state(name) for name in self.optimizer.local]
        self.sizes["optimizer"] = storage_bytes(tree_leaves((state, self.optimizer.adamw.param_groups[0]["lr"])))

    def load(self, compile_backend: str | None) -> None:
        with fake_device.host_values():
            model = build_model(self.config, self.job.lora, torch.bfloat16)
        set_buffers(model.root, {name: self.mode.from_tensor(each) for name, each in model.root.named_buffers()})
        with self.monitor.paused():
            self.divide(model, compile_backend)
        allocate(self.root, self.device.torch)
        base, adapter = base_parameters(self.root), adapter_parameters(self.root)
        self.sizes["base"] = storage_bytes(base.values())
        self.sizes["adapter"] = storage_bytes(adapter.values())
        self.uneven = any(
            local_tensor(each).numel() * self.workers.size != each.numel() * copies(each, self.workers.size)
            for each in (*base.values(), *adapter.values())
        )
        if compile_backend is None:
            self._mark_phases()

    def trace_step(self) -> None:
        """One optimizer step. The first, second and last of its micro-batches differ, and no others."""
        training = self.job.training
        count = min(MICRO_BATCHES, training.gradient_accumulation_steps)
        micro_batches = [[None] * training.per_device_batch_size] * count
        with self.watching:
            self.step(0, micro_batches, 1, training.learning_rate)

    @property
    def phases(self) -> dict[PhaseKey, Phase]:
        return self.monitor.phases

    def matching_phases(self, other: TracedEngine) -> Iterator[tuple[PhaseKey, PhaseKey]]:
        """Pairs of a phase here and its like in a model with other layers, for layers counted from either end."""
        count, others = (len(engine.root.lm.model.layers) for engine in (self, other))
        for part, what, index in self.phases:
            if what not in ("forward", "backward") or index <= count // 2:
                yield (part, what, index), (part, what, index)
            if what in ("forward", "backward") and index >= count // 2:
                yield (part, what, index), (part, what, index + others - count)

    def problems(self) -> list[str]:
        """Tensors that were on another device."""
        found = self.monitor.elsewhere.items()
        return [f"{operator}: a tensor is on the device {device}{place}" for (operator, device), place in found]

    # --- the engine's steps, marked

    def _host_batch(self, rows: Sequence[Row | None]) -> ModelBatch:
        with fake_device.host_values():
            batch = super()._host_batch(rows)
        return ModelBatch(*(None if tensor is None else self.mode.from_tensor(tensor) for tensor in batch))

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.ones((), device=self.device.torch)  # of a constant, fake mode would compute with values

    def _batch(self, rows: Sequence[Row | None]) -> ModelBatch:
        with self.monitor.paused():  # the transfer to the device has a tensor on the host
            batch = super()._batch(rows)
        for tensor in batch:
            if tensor is not None:
                self.monitor.track(tensor, "batch")
        return batch

    def _summed_loss(self, rows: Sequence[Row | None]) -> torch.Tensor:
        self.part = "probe"
        return super()._summed_loss(rows)

    def _sum_gradients(self, is_last: bool) -> None:
        self._note_gradients()
        self.part = "last micro-batch" if is_last else "micro-batch"
        super()._sum_gradients(is_last)
        self.monitor.begin((self.part, "batch", 0))

    def _backward(self, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int) -> torch.Tensor:
        self.before = self.monitor.live.other
        loss = super()._backward(micro_batches, trained_tokens)
        self._note_gradients()
        self.part = "update"
        self.monitor.begin((self.part, "", 0))
        return loss

    def _note_gradients(self) -> None:
        held = self.monitor.live.other - self.before
        self.sizes["gradients"] = max(self.sizes.get("gradients", 0), held)

    def _mark_phases(self) -> None:
        """Have the monitor begin a phase at each layer and at the loss, in both passes."""

        def begin(what: str, index: int = 0) -> None:
            self.monitor.begin((self.part, what, index))

        def mark(module: torch.nn.Module, index: int, forward: str, backward: str) -> None:
            def before(*_: Any) -> None:
                begin(forward, index)

            def after(_: Any, __: Any, output: torch.Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(lambda _: begin(backward, index))

            module.register_forward_pre_hook(before, prepend=True)
            module.register_forward_hook(after)

        for index, layer in enumerate(self.root.lm.model.layers):
            mark(layer, index, "forward", "backward")
        mark(self.root.lm.model.norm, 0, "norm", "norm backward")
        self.root.lm.model.norm.register_forward_hook(lambda *_: begin("loss"))
        self.root.register_forward_hook(self._end_of_forward)

    def _end_of_forward(self, *_: Any) -> None:
        if self.part != "probe":
            batch = self.monitor.phases[self.part, "batch", 0].start.other
            self.sizes["activations"] = self.monitor.live.other - batch
            self.monitor.begin((self.part, "loss backward", 0))


def storage_bytes(tensors: Any) -> int:
    """Bytes of this worker's storages of tensors; those that share one count once."""
    storages = {id(storage): storage for storage in (local_tensor(tensor).untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def problem(error: Exception) -> str:
    """One line for an error of a traced step: what cannot run on the device, and where."""
    text, place = " ".join(str(error).split())[:300], place_of(traceback.extract_tb(error.__traceback__))
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"{error.func}: its result depends on data{place}"
    if isinstance(error, UnsupportedOperatorException):
        return f"{error.func}: no rule for its shape is known{place}"
    if "same device" in text or "different devices" in text:
        return f"a tensor is on another device: {text}{place}"
    return f"{type(error).__name__}: {text}{place}"


def place_of(frames: traceback.StackSummary) -> str:
    """The innermost line of code that is neither PyTorch's nor the trace's, as " (file:line)"."""
    own = [Path(__file__), Path(fake_device.__file__)]
    places = [
        f" ({'/'.join(file.parts[-3:])}:{frame.lineno})"
        for frame in frames
        if (file := Path(frame.filename)) not in own and TORCH not in file.parents and file.suffix == ".py"
    ]
    return places[-1] if places else ""
