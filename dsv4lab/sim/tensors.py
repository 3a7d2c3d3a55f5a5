"""Which memory a kernel may touch: the tensors that were handed to CuTeDSL and every live torch CPU tensor, with their names.

CuTeDSL types a tensor by the device that its DLPack capsule names, and generates other code for host memory. `as_device` makes
a CPU tensor say "CUDA device 0" while its memory stays where it is, which is what a simulated launch needs.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dsv4lab.sim.errors import MemoryFault
from dsv4lab.sim.memory import Allocation, Extent, GlobalMemory

_CPU, _CUDA = 1, 2  # DLDeviceType
SOURCE = "_dsv4lab_source"  # attribute of a CuTeDSL tensor: what it was made from


class _DLTensor(ctypes.Structure):
    """DLTensor of the DLPack ABI, which is also the head of DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


@dataclass(frozen=True)
class Block:
    """A piece of process memory and the tensor that it belongs to. owner: what keeps it allocated, if known."""

    name: str
    address: int
    size: int
    extent: Extent
    owner: Any = None


class DeviceTensor:
    """A CPU tensor whose DLPack capsule says that it lives on CUDA device 0. Everything public else is the tensor's own."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # torch's C exchange interface would bypass the capsule
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.tensor.__dlpack__()
        tensor = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
        if tensor.device_type == _CPU:
            tensor.device_type = _CUDA
        return capsule


def as_device(value: Any) -> Any:
    """The value, wrapped where it is a tensor in host memory; tuples, lists and dicts are searched."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_device, value))
    if isinstance(value, tuple | list):
        return type(value)(map(as_device, value))
    if isinstance(value, dict):
        return {key: as_device(item) for key, item in value.items()}
    if isinstance(value, DeviceTensor) or not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        return value
    return DeviceTensor(value) if int(value.__dlpack_device__()[0]) == _CPU else value


def describe(tensor: Any, name: str) -> Block | None:
    """The memory of a torch tensor (its whole storage) or of anything else with DLPack (its span); None if it has none."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return None
        storage = tensor.untyped_storage()
        extent = Extent()
        if tensor.storage_offset() == 0 and tensor.dim():
            extent = Extent(tuple(tensor.shape), tensor.stride(), tensor.element_size())
        return Block(name, storage.data_ptr(), storage.nbytes(), extent, storage) if storage.nbytes() else None
    capsule = tensor.__dlpack__()
    found = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    if not found.data or found.device_type not in (_CPU, _CUDA):
        return None
    shape = tuple(found.shape[i] for i in range(found.ndim))
    strides = tuple(found.strides[i] for i in range(found.ndim)) if found.strides else _compact(shape)
    size = found.bits * found.lanes // 8 or 1
    span = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * size if all(shape) else 0
    return Block(name, found.data + found.byte_offset, span, Extent(shape, strides, size), tensor) if span > 0 else None


def _compact(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)


class Registry:
    """Tensors seen by CuTeDSL, held weakly, and names given to them."""

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._blocks: list[Block] = []

    def see(self, tensor: Any) -> None:
        """Remember a tensor for as long as it lives."""
        try:
            self._seen[id(tensor)] = weakref.ref(tensor)
        except TypeError:  # cannot be referred to weakly; its memory is then known only if a live torch tensor shares it
            return

    def add(self, name: str, address: int, size: int) -> None:
        """Register memory that no tensor owns, until `remove`."""
        self._blocks.append(Block(name, address, size, Extent((size,), (1,), 1)))

    def remove(self, address: int) -> None:
        self._blocks = [block for block in self._blocks if block.address != address]

    def blocks(self, names: Mapping[str, Any] | None = None, *, everything: bool = False) -> list[Block]:
        """The memory of every tensor that CuTeDSL saw or that is named; with `everything`, of every live torch CPU tensor.

        names: tensors by name; others are named after a variable of a calling function.
        """
        known: dict[int, str] = {}
        tensors: list[Any] = []
        for name, value in _local_names(sys._getframe(1)).items():
            known |= {id(tensor): name + suffix for suffix, tensor in _tensors(value)}
        for name, value in (names or {}).items():
            for suffix, tensor in _tensors(value):
                known[id(tensor)] = name + suffix
                tensors.append(tensor)
        tensors += [tensor for reference in self._seen.values() if (tensor := reference()) is not None]
        self._seen = {key: reference for key, reference in self._seen.items() if reference() is not None}
        found: dict[int, Block] = {}
        for tensor in [*(_live_torch_tensors() if everything else ()), *tensors]:
            name = known.get(id(tensor), "")
            block = describe(tensor, name or f"a tensor {tuple(tensor.shape)} {tensor.dtype}".replace("torch.", ""))
            if block is None:
                continue
            other = found.get(block.address)
            if other is None or block.size > other.size or (name and block.size == other.size):
                found[block.address] = block
        return [*self._blocks, *sorted(found.values(), key=lambda block: -block.size)]

    def memory(self, names: Mapping[str, Any] | None = None) -> GlobalMemory:
        """The machine's global memory. It keeps the tensors' memory allocated as long as it lives."""
        return _LiveMemory(self, names)


class _LiveMemory(GlobalMemory):
    """Starts with the tensors that CuTeDSL saw. An address outside them makes it look for more, once: kernels may get plain
    pointers, and finding all live tensors takes a tenth of a second."""

    def __init__(self, registry: Registry, names: Mapping[str, Any] | None) -> None:
        super().__init__()
        self._registry, self._names, self._complete = registry, names, False
        self._owners: list[Any] = []
        self._extend()

    def _extend(self) -> None:
        for block in self._registry.blocks(self._names, everything=self._complete):
            self._owners.append(block.owner)
            self.add(block.name, block.address, block.size, block.extent)

    def find(self, address: int) -> Allocation:
        try:
            return super().find(address)
        except MemoryFault:
            if self._complete:
                raise
        self._complete = True
        self._extend()
        return super().find(address)


def _tensors(value: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(suffix of the name, tensor) of a value, its items and fields."""
    source = vars(value).get(SOURCE) if hasattr(value, "__dict__") else None
    if source is not None:
        yield "", source
    elif isinstance(value, DeviceTensor):
        yield "", value.tensor
    elif hasattr(type(value), "__dlpack__"):
        yield "", value
    elif depth and isinstance(value, tuple | list):
        for index, item in enumerate(value[:64]):
            yield from ((f"[{index}]{suffix}", tensor) for suffix, tensor in _tensors(item, depth - 1))
    elif depth and isinstance(value, dict) and len(value) <= 64:
        for key, item in value.items():
            yield from ((f"[{key!r}]{suffix}", tensor) for suffix, tensor in _tensors(item, depth - 1))


def _local_names(frame: FrameType | None) -> dict[str, Any]:
    """Local variables of all calling functions; where a name occurs twice, the innermost one."""
    names: dict[str, Any] = {}
    package = __name__.rpartition(".")[0]
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("cutlass", package, "tvm_ffi")):
            for name, value in frame.f_locals.items():
                names.setdefault(name, value)
        frame = frame.f_back
    return names


def _live_torch_tensors() -> list[Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    kinds = {torch.Tensor, torch.nn.Parameter}
    return [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device.type == "cpu"]
