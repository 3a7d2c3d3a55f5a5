"""Traces of a GPU: whose kernels ran, how long each took, and which launch each came from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4lab.dispatch import Call
from dsv4lab.lab import trace
from dsv4lab.lab.trace import Kernel, Launch

OURS = "kernel_cutlass_kernel_dsv4labkernelsmoerouterdirectDirectLogits_object_at__tensorptrbf16gmemalign16odiv64i64div641_0"
SAMPLE = "kernel_cutlass_sample_dsv4labkernelsheadsamplerkernelSampler_object_at__tensorptrf32gmemalign16odiv4i64div41_0"
# As profiles of torch 2.11 name them.
COPIES = {
    "Memcpy DtoD (Device -> Device)": "memcpy",
    "Memcpy HtoD (Pageable -> Device)": "memcpy",
    "Memset (Device)": "memset",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int, "
    "at::native::FillFunctor<float>, std::array<char*, 1ul>)": "torch fill",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda("
    "at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#7}::operator()() const::{lambda(float)#1}>(...)": (
        "torch copy"
    ),
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::"
    "{lambda(float)#1}, std::array<char*, 2ul> >(int, ...)": "torch copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::(anonymous namespace)::OpaqueType<8u>, "
    "unsigned int, 1, 64, 64>(...)": "torch cat",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl<"
    "at::native::OpaqueType<2> >(at::TensorIteratorBase&, ...)": "torch index",
    "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long, unsigned int, 2, 2, -2>(...)": (
        "torch index"
    ),
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long, bool)": (
        "torch gather"
    ),
    "void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_scatter_gather_internal_kernel<false, "
    "at::native::OpaqueType<4> >::operator()<at::native::TensorAssign>(...)": "torch gather",
}
FOREIGN = (
    "nvjet_tst_128x64_64x10_1x2_h_bz_coopA_TNT",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >(int, ...)",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_put_kernel_impl<"
    "at::native::OpaqueType<4> >(at::TensorIterator&, ...)",
    "void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_scatter_gather_internal_kernel<true, "
    "float>::operator()<at::native::ReduceAdd>(...)",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>>>(...)",
    "triton_poi_fused_copy_0",
    "kernel_cutlass_kernel_quackrmsnormRMSNorm_object_at__tensorptrbf16gmemalign16odiv8i64div81_0",
)


def test_rooms_of_kernels_and_of_operations() -> None:
    names = [OURS, SAMPLE, *COPIES, *FOREIGN]
    assert trace.rooms(names) == {"moe", "head"} and trace.rooms(FOREIGN) == set()
    assert trace.rooms(profile(event(OURS, 0, 1), event(SAMPLE, 0, 1, device="CPU"))) == {"moe"}
    calls = [Call(name, "", {}, None) for name in ("sample", "rmsnorm", "dequantize", "attention")]
    assert trace.rooms_called(calls) == {"head", "quant", "attention"}


def test_a_table_of_what_ran_and_the_graphs_among_it() -> None:
    copy, other = next(iter(COPIES)), FOREIGN[0]
    found = profile(
        event("cudaGraphLaunch", 0, 9, device="CPU"),
        event("cudaLaunchKernel", 0, 9, device="CPU"),
        event(copy, 0, 50),
        event(OURS, 60, 62),
        event(OURS, 70, 73),
        event(SAMPLE, 80, 90),
        event(other, 90, 91),
        event("cudaGraphLaunch_v10000", 0, 9, device="CPU"),
    )
    assert trace.graph_replays(found) == 2
    assert [tuple(row.values()) for row in trace.by_name(found)] == [
        ("ours", "Sampler.sample", 1, 10.0),
        ("ours", "DirectLogits", 2, 5.0),
        ("copies", "memcpy", 1, 50.0),
        ("others", other, 1, 1.0),
    ]


def profile(*events: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(events=lambda: list(events))


def event(
    name: str, start: float, end: float, *, device: str = "CUDA", named: bool = False, stream: int = 7
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=getattr(torch.autograd.DeviceType, device),
        is_user_annotation=named,
        device_resource_id=stream,
    )


# ---- whose it is -------------------------------------------------------------------------------------------------------
def test_our_kernels_and_torch_s_copies_are_not_foreign() -> None:
    assert all(trace.is_ours(name) and not trace.is_copy(name) for name in (OURS, SAMPLE))
    assert all(trace.is_copy(name) and not trace.is_ours(name) for name in COPIES)
    assert trace.foreign([OURS, SAMPLE, *COPIES]) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_whatever_computes_is_foreign(name: str) -> None:
    assert trace.foreign([OURS, name, *COPIES, name]) == [name]


def test_names_for_a_table() -> None:
    assert (trace.short(OURS), trace.short(SAMPLE)) == ("DirectLogits", "Sampler.sample")
    assert {name: trace.short(name) for name in COPIES} == COPIES
    assert trace.short("nvjet_tst") == "nvjet_tst" and len(trace.short(FOREIGN[1])) == 60


def test_what_the_profiler_of_torch_sees_on_a_cpu_is_no_kernel() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        torch.ones(3) + 1
    assert len(found.events()) and trace.kernels_of(found) == [] and trace.foreign(found) == []


def test_kernels_of_a_profile_are_in_order_and_foreign_ones_are_found() -> None:
    found = profile(
        event("nvjet", 5.0, 6.0),
        event(OURS, 1.0, 4.0, stream=9),
        event("aten::mm", 0.0, 9.0, device="CPU"),
        event("a step", 0.0, 9.0, named=True),
    )
    assert trace.kernels_of(found) == [Kernel(OURS, 1.0, 4.0, 9), Kernel("nvjet", 5.0, 6.0, 7)]
    assert trace.foreign(found) == ["nvjet"]


# ---- how long ----------------------------------------------------------------------------------------------------------
def test_waiting_for_the_kernel_ahead_is_not_a_kernel_s_own_time() -> None:
    chain = [Kernel("a", 0.0, 5.0), Kernel("b", 2.0, 8.0), Kernel("c", 9.0, 10.0)]
    assert trace.added_us(chain) == [5.0, 3.0, 1.0] and [k.us for k in chain] == [5.0, 6.0, 1.0]
    beside = [Kernel("a", 0.0, 9.0), Kernel("b", 1.0, 4.0), Kernel("c", 8.0, 12.0)]
    assert trace.added_us(beside) == [9.0, 3.0, 3.0], "b ran beside a, c waited for it"
    streams = [Kernel("a", 0.0, 9.0, 1), Kernel("b", 1.0, 4.0, 2), Kernel("c", 3.0, 6.0, 2)]
    assert trace.added_us(streams) == [9.0, 3.0, 2.0]


def test_runs_must_be_equal() -> None:
    kernels = [Kernel(name, float(i), i + 0.5) for i, name in enumerate("abab")]
    assert [[k.name for k in run] for run in trace.runs_of(kernels, 2)] == [["a", "b"], ["a", "b"]]
    for count, names in ((3, "abab"), (2, "abac")):
        with pytest.raises(ValueError, match=f"{count} equal runs, got 4 kernels"):
            trace.runs_of([Kernel(name, float(i), i + 0.5) for i, name in enumerate(names)], count)


# ---- where it came from ------------------------------------------------------------------------------------------------
def test_kernels_find_their_launch() -> None:
    launched = [Launch(names) for names in ({"quantise", "product"}, {"product"}, {"scores", "choice"}, {"scores"})]
    names = ["quantise", "product", "scores", "product", "choice", "scores", "copy"]
    kernels = [Kernel(name, float(i), i + 0.5) for i, name in enumerate(names)]
    assert trace.launches_of(kernels, launched) == [0, 0, 2, 1, 2, 3, None]
    twice = [Kernel("a", float(i), i + 0.5) for i in range(4)]
    assert trace.launches_of(twice, [Launch({"a"}), Launch({"a"})]) == [0, 0, 1, 1]
    assert trace.launches_of(twice[:3], [Launch({"a"}), Launch({"a"})]) == [None] * 3, "nobody can tell"


def test_streams_tell_kernels_of_one_name_apart() -> None:
    """The host launches two on a second stream, then three; the GPU runs the second of them last."""
    launched = [Launch({"a"}, stream) for stream in (5, 5, 0, 0, 0)]
    kernels = [Kernel("a", float(i), i + 0.5, stream) for i, stream in enumerate((21, 22, 22, 22, 21))]
    assert trace.launches_of(kernels, launched) == [0, 2, 3, 4, 1]
    alike = [Kernel("a", float(i), i + 0.5, stream) for i, stream in enumerate((21, 22, 23, 22, 21))]
    assert trace.launches_of(alike, launched) == [0, 1, 2, 3, 4], "three streams are not two: in order"
    assert trace.launches_of(kernels[:4], launched[:4]) == [0, 1, 2, 3], "2 and 2 are not 1 and 3: in order"


def test_rows_are_medians_of_the_runs() -> None:
    def run(at: float, slow: float) -> list[Kernel]:
        return [Kernel("b", at, at + 2.0), Kernel("a", at + 1.0, at + 3.0 + slow), Kernel("x", at + 9.0, at + 9.5)]

    kernels = [k for at, slow in ((0.0, 0.0), (100.0, 4.0), (200.0, 1.0)) for k in run(at, slow)]
    found = trace.rows_of(kernels, 3, [Launch({"b"}), Launch({"a"})])
    assert [(row.name, row.launch, row.count) for row in found] == [("b", 0, 1), ("a", 1, 1), ("x", None, 1)]
    assert found[1].us == pytest.approx(2.0) and found[1].runs_us == pytest.approx(3.0)
