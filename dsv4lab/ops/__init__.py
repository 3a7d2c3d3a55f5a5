"""One operation, one name: what models and notebooks call.

`ops.<name>` takes the arguments of `reference.<name>`. Underneath lies one `torch.library` operator `dsv4lab::<name>` an
operation, with a shape function for meta tensors. What runs is decided by the active backend and the device:

- "auto" (default): a CUDA tensor goes to the kernel registered for its architecture. Where there is none for the operation or
  its arguments, the float32 reference runs, and a warning says so, once for each reason: float32 activations, say, of which
  many kernels take none. `dequantize` and `quantize_fp8_blocks`, which prepare weights, have no kernel and warn of nothing.
  A CPU tensor goes to the reference. `implementations()` says what there is.
- "reference": the float32 reference, on any device.
- "kernel": the kernel on the GPU; "sim": the same kernel, of the architecture named, in the simulator on CPU tensors.
  MissingKernel where there is none.

Kernels keep what they make of a weight once. `forget_prepared()` after changing one through `.data` or in inference mode, which
nobody sees; CUDA graphs are to be captured again then. Slots, tables and ids are looked at on the CPU, on a GPU where that is
asked for: `dsv4lab.paging`.

`observe()` collects every call with its inputs and outputs, for pictures and for checking kernels on real activations.
"""

from dsv4lab.dispatch import (
    BACKENDS,
    Backend,
    Call,
    MissingKernel,
    backend,
    implementations,
    observe,
    references,
    register_kernel,
    scope,
)
from dsv4lab.kernels._common.aside import starting
from dsv4lab.kernels._common.kept import forget as forget_prepared
from dsv4lab.kernels.registry import KERNELS
from dsv4lab.ops.cache import cache_read, cache_write, compress
from dsv4lab.ops.decoding import advance_decode, decode_plan, match_drafts
from dsv4lab.ops.experts import (
    moe,
    moe_combine,
    moe_layer,
    router_hash,
    router_topk,
    shared_expert,
    swiglu,
    swiglu_fp8,
    swiglu_nvfp4,
)
from dsv4lab.ops.gemm import grouped_linear, linear, lm_head, two_linears
from dsv4lab.ops.head import accept_drafts, lm_head_greedy, lm_head_peaks, lm_head_sample, mtp_input, probabilities, sample
from dsv4lab.ops.indexing import attention, index_query, index_scores, index_topk
from dsv4lab.ops.mhc import (
    embed_streams,
    mhc_head,
    mhc_post,
    mhc_post_pre,
    mhc_post_pre_quantized,
    mhc_pre,
    mhc_pre_quantized,
)
from dsv4lab.ops.norm import (
    inverse_rope,
    inverse_rope_fp8,
    inverse_rope_nvfp4,
    q_norm_rope,
    rmsnorm,
    rmsnorm_fp8,
    rmsnorm_nvfp4,
)
from dsv4lab.ops.quant import dequantize, quantize_fp8_blocks, quantize_fp8_rows, quantize_mxfp4, quantize_nvfp4

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "MissingKernel",
    "accept_drafts",
    "advance_decode",
    "attention",
    "backend",
    "cache_read",
    "cache_write",
    "compress",
    "decode_plan",
    "dequantize",
    "embed_streams",
    "forget_prepared",
    "grouped_linear",
    "implementations",
    "index_query",
    "index_scores",
    "index_topk",
    "inverse_rope",
    "inverse_rope_fp8",
    "inverse_rope_nvfp4",
    "linear",
    "lm_head",
    "lm_head_greedy",
    "lm_head_peaks",
    "lm_head_sample",
    "match_drafts",
    "mhc_head",
    "mhc_post",
    "mhc_post_pre",
    "mhc_post_pre_quantized",
    "mhc_pre",
    "mhc_pre_quantized",
    "moe",
    "moe_combine",
    "moe_layer",
    "mtp_input",
    "observe",
    "probabilities",
    "q_norm_rope",
    "quantize_fp8_blocks",
    "quantize_fp8_rows",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "references",
    "register_kernel",
    "rmsnorm",
    "rmsnorm_fp8",
    "rmsnorm_nvfp4",
    "router_hash",
    "router_topk",
    "sample",
    "scope",
    "shared_expert",
    "starting",
    "swiglu",
    "swiglu_fp8",
    "swiglu_nvfp4",
    "two_linears",
]

for _kernel in KERNELS:
    register_kernel(_kernel.operation, _kernel.arch, _kernel.function, refuses=_kernel.refuses)
