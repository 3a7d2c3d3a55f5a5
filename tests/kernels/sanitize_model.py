"""Every kernel of hyper-connections, head and sampler once, on small shapes, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python -m tests.kernels.sanitize_model

Results are compared with the reference, so that a run that does nothing does not pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4lab.formats import BF16, PackedWeight
from dsv4lab.kernels.gemm.mixed.api import linear, partial_argmax
from dsv4lab.kernels.gemm.mixed.config import MixedConfig
from dsv4lab.kernels.gemm.mixed.prepared import prepare
from dsv4lab.kernels.head.greedy.api import pick_largest
from dsv4lab.kernels.head.mtp.api import add_streams
from dsv4lab.kernels.head.sampler.api import accept_drafts, probabilities, sample
from dsv4lab.kernels.mhc import api as mhc
from dsv4lab.reference import mhc as mhc_reference
from dsv4lab.reference import sampling
from dsv4lab.reference.head import peaks_of
from tests.kernels.test_decoding import check
from tests.kernels.test_lm_head_greedy import FEW
from tests.kernels.test_lm_head_sample import CONFIGS, both, drawn, operands
from tests.kernels.test_mhc import ONE, on_gpu
from tests.kernels.test_mhc_quant import arguments, check_values, how_of
from tests.kernels.test_mhc_quant import check as check_codes
from tests.kernels.test_sampler import check_probabilities, check_sample, rows, settings


def hyper_connections() -> None:
    how = dict(eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20)
    norm = torch.ones(256, device="cuda").bfloat16()
    fn, base, scale = (torch.randn(*shape, device="cuda") / 8 for shape in ((24, 1024), (24,), (3,)))
    for tokens in (3, 300):
        streams = torch.randn(tokens, 4, 256, device="cuda").bfloat16()
        x, post, comb = mhc.mhc_pre(streams, fn, base, scale, norm, **how)
        want = mhc_reference.mhc_pre(streams, fn, base, scale, norm, **how)
        assert (comb - want[2]).abs().max() < 1e-5 and (x - want[0]).abs().max() < 0.05
        new, *_ = mhc.mhc_post_pre(x, streams, post, comb, fn, base, scale, norm, **how)
        assert torch.equal(new, mhc.mhc_post(x, streams, post, comb))
        assert (new - mhc_reference.mhc_post(x, streams, post, comb)).abs().max() < 0.1
        args = (streams, fn[:4].contiguous(), base[:4].contiguous(), scale[:1], norm)
        head, want = (f(*args, eps=1e-6, hc_eps=1e-6) for f in (mhc.mhc_head, mhc_reference.mhc_head))
        assert (head - want).abs().max() < 0.05
        ids = torch.arange(tokens, device="cuda")
        assert torch.equal(mhc.embed_streams(ids, streams[:, 0].contiguous(), num_streams=4)[:, 3], streams[:, 0])


def codes() -> None:
    """Hyper-connections by one kernel, whose clusters finish tokens; their rows as BF16, as codes."""
    for split in (2, 8):
        config = replace(ONE, columns=split * 128, split=split)
        args = on_gpu(arguments(config, 3))
        for kind in ("fp8", "nvfp4"):
            named = how_of(kind, device="cuda")
            found = check_codes(config, kind, args, named)
            check_values(found[:2], args, named.get("global_scale"))


def sampling_and_drafts() -> None:
    for batch, vocab in ((10, 4096), (11, 2503)):
        args = {name: value.cuda() for name, value in settings(batch).items()}
        logits = rows("plain", batch, vocab).cuda()
        peaks = peaks_of(logits) if batch > 10 else None
        assert check_sample(logits, args, sample(logits, *args.values(), peaks)) <= 1
        kept = list(args.values())[:3]
        assert check_probabilities(logits, args, probabilities(logits, *kept, peaks)) <= 1
    target, draft = (torch.rand(5, n, 2503, device="cuda").softmax(-1) for n in (4, 3))
    ids = torch.randint(0, 2503, (5, 3), device="cuda")
    seed, position = torch.arange(5, device="cuda"), torch.arange(5, device="cuda") * 3
    found = accept_drafts(target, draft, ids, seed, position)
    wanted = sampling.accept_drafts(target, draft, ids, seed=seed, position=position)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for batch, drafts in ((3, 0), (130, 2)):
        check(lambda f, *args, **how: f(*args, **how), batch, drafts, device="cuda")


def greedy_head() -> None:
    few = replace(FEW, format="bf16", out="argmax")
    many = MixedConfig("bf16", "argmax", 32, 4, 2, 2, cluster=2)
    for m, config in ((5, few), (5, replace(few, cluster=2)), (13, replace(few, tokens=16, slabs=1, splits=1)), (33, many)):
        x, weight = (torch.randn(n, 512, device="cuda").bfloat16() for n in (m, 200))
        ready = prepare(PackedWeight(BF16, weight))
        torch.cuda.synchronize()
        logits = linear(x, ready, out_dtype=torch.float32, config=replace(config, out="f32"))
        assert torch.equal(pick_largest(partial_argmax(x, ready, config=config)), logits.argmax(-1)), config


def drawing_head() -> None:
    for m, vocab, depth, config in CONFIGS:
        x, weight, draws = operands(m, vocab, depth)
        ids, logits = both(x.cuda(), weight.cuda(), replace(draws, **{k: v.cuda() for k, v in vars(draws).items()}), config)
        assert torch.equal(ids.cpu(), drawn(logits.cpu(), draws)), config


def streams() -> None:
    e, f = torch.randn(7, 256, device="cuda").bfloat16(), torch.randn(7, 4, 256, device="cuda").bfloat16()
    assert torch.equal(add_streams(e, f), (e.float()[:, None] + f.float()).bfloat16())


if __name__ == "__main__":
    torch.manual_seed(0)
    hyper_connections()
    codes()
    sampling_and_drafts()
    greedy_head()
    drawing_head()
    streams()
    torch.cuda.synchronize()
    print("all as the reference has it")
