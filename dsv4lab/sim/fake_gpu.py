"""torch and cuda-bindings as a script written for a GPU expects them, with everything on the CPU, for the duration of a block.

with fake_gpu("sm_100a", multiprocessors=148):
    torch.zeros(4, device="cuda")        # a CPU tensor
    torch.cuda.get_device_capability()   # (10, 0)

Streams, events and profilers do nothing and measure nothing. CuTeDSL's benchmark helper calls what it is given once, unless a
kernel was launched before; what a CUDA graph captures is executed then and there, and its replays do nothing.
`torch._scaled_mm`, which torch has for block scales on GPUs only, is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from dsv4lab.sim.session import ARCHITECTURES, SHARED_BYTES, current

_MEMORY_BYTES, _L2_BYTES = 64 << 30, 50 << 20
_DRIVER_VERSION = 13000
_IGNORED = ("synchronize", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "init", "_lazy_init")  # of torch.cuda


@contextmanager
def fake_gpu(arch: str, *, multiprocessors: int) -> Iterator[None]:
    """Let torch accept device "cuda" inside the block and keep everything on the CPU. Everything is put back afterwards."""
    import torch
    import torch.profiler

    major, minor, _ = ARCHITECTURES[arch]
    facts = SimpleNamespace(
        name=f"simulated {arch}",
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        total_memory=_MEMORY_BYTES,
        L2_cache_size=_L2_BYTES,
    )
    with ExitStack() as stack:
        replaced = _Replaced()
        stack.callback(replaced.restore)
        replaced.put(
            torch.cuda,
            is_available=_always(True),
            device_count=_always(1),
            current_device=_always(0),
            current_stream=_Nothing,
            default_stream=_Nothing,
            stream=_Nothing,
            Stream=_Nothing,
            Event=_Nothing,
            CUDAGraph=_Nothing,
            graph=_Nothing,
            get_device_capability=_always((major, minor)),
            get_device_name=_always(facts.name),
            get_device_properties=_always(facts),
            **{name: _always(None) for name in _IGNORED},  # one function each: torch.compile tells functions apart by identity
        )
        replaced.put(torch.profiler, profile=_Nothing)
        replaced.put(torch.Tensor, cuda=_itself, pin_memory=_itself)
        replaced.put(torch, _scaled_mm=scaled_mm)
        _replace_bindings(replaced, facts)
        _replace_benchmarks(replaced)
        stack.enter_context(_on_cpu())
        yield


def _on_cpu() -> Any:
    """A mode in which every device "cuda" that torch is given is the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    def cpu(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda"):
            return "cpu"
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
                return args[0]
            return func(*map(cpu, args), **{key: cpu(value) for key, value in (kwargs or {}).items()})

    return OnCpu()


class _Replaced:
    """Attributes set for a while."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, **values: Any) -> None:
        for name, value in values.items():
            self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)

    def restore(self) -> None:
        for owner, name, original in reversed(self._originals):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._originals.clear()


_ABSENT = object()


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _itself(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


class _Nothing:
    """Streams, events, profilers: accepts any call, measures nothing."""

    cuda_stream = 0
    cuda_event = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _always(_Nothing())


def _replace_bindings(replaced: _Replaced, facts: SimpleNamespace) -> None:
    from cuda.bindings import driver, runtime

    done, fine = driver.CUresult.CUDA_SUCCESS, runtime.cudaError_t.cudaSuccess
    attributes = {
        "MULTIPROCESSORCOUNT": facts.multi_processor_count,
        "SHARED": SHARED_BYTES,
        "MAJOR": facts.major,
        "MINOR": facts.minor,
    }

    def attribute(which: Any, device: Any = 0) -> int:
        name = str(which).upper().replace("_", "")
        return next((value for part, value in attributes.items() if part in name), 0)

    replaced.put(
        driver,
        cuInit=_always((done,)),
        cuDeviceGetCount=_always((done, 1)),
        cuDeviceGet=_always((done, 0)),
        cuDeviceGetAttribute=lambda *a: (done, attribute(*a)),
        cuCtxGetCurrent=lambda: (done, driver.CUcontext(1)),
        cuCtxGetDevice=_always((done, 0)),
        cuDevicePrimaryCtxRetain=lambda *a: (done, driver.CUcontext(1)),
        cuCtxSetCurrent=_always((done,)),
        cuCtxSynchronize=_always((done,)),
        cuStreamSynchronize=_always((done,)),
        cuStreamCreate=lambda *a: (done, driver.CUstream(0)),
        cuStreamDestroy=_always((done,)),
        cuDriverGetVersion=_always((done, _DRIVER_VERSION)),
    )
    replaced.put(
        runtime,
        cudaGetDeviceCount=_always((fine, 1)),
        cudaGetDevice=_always((fine, 0)),
        cudaSetDevice=_always((fine,)),
        cudaDeviceSynchronize=_always((fine,)),
        cudaStreamSynchronize=_always((fine,)),
        cudaGetLastError=_always((fine,)),
        cudaStreamCreate=lambda *a: (fine, runtime.cudaStream_t(0)),
        cudaStreamDestroy=_always((fine,)),
        cudaDeviceGetAttribute=lambda *a: (fine, attribute(*a)),
    )


def _replace_benchmarks(replaced: _Replaced) -> None:
    import cutlass.cute.testing
    import cutlass.testing

    simulator = current()
    before = simulator.launches

    def benchmark(function: Callable[..., Any], *_: Any, kernel_arguments: Any = None, **more: Any) -> float:
        if simulator.launches == before:
            make = more.get("workspace_generator")
            arguments = make() if make is not None else kernel_arguments
            function(*getattr(arguments, "args", ()), **getattr(arguments, "kwargs", {}))
        return 1.0

    for module in (cutlass.cute.testing, cutlass.testing):
        replaced.put(module, benchmark=benchmark)


def scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None, out_dtype: Any = None, **_: Any) -> Any:
    """torch._scaled_mm with block scales in cuBLAS's 128 x 4 tiles: E4M3 scales per 16 columns, E8M0 ones per 32."""
    import torch

    def values(matrix: Any) -> Any:
        if matrix.dtype != torch.float4_e2m1fn_x2:
            return matrix.float()
        magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        codes = matrix.view(torch.uint8)
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
        return torch.where(codes >= 8, -magnitudes[codes & 7], magnitudes[codes & 7])

    def scales(packed: Any, rows: int, blocks: int) -> Any:
        tiles = packed.float().reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
        return tiles.permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, -1)[:rows, :blocks]

    left, right = values(a), values(b.t())
    block = 16 if scale_a.dtype == torch.float8_e4m3fn else 32
    count = left.shape[1] // block
    left = left * scales(scale_a, left.shape[0], count).repeat_interleave(block, 1)
    right = right * scales(scale_b, right.shape[0], count).repeat_interleave(block, 1)
    return (left @ right.T).to(out_dtype)
