"""Every kernel of the attention stack once, on small shapes, for NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python -m tests.kernels.sanitize_attention

Results are compared with the reference, so that a run that does nothing does not pass.
"""

from __future__ import annotations

import torch

from dsv4lab.kernels.cache.read.api import read_keys
from dsv4lab.kernels.cache.write.api import write_keys
from dsv4lab.kernels.indexer.query.api import index_query
from dsv4lab.kernels.indexer.scores.api import index_scores
from dsv4lab.kernels.indexer.scores.config import IndexScoresConfig
from dsv4lab.kernels.indexer.topk.api import index_topk
from dsv4lab.kernels.rope.heads import api as heads_api
from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference import cache, indexer, norm, quant, rope
from tests.kernels.attention import in_order, judge, make_case
from tests.kernels.test_attention_resident import run as run_resident
from tests.kernels.test_attention_share import run as run_shared
from tests.kernels.test_compress import Scene, long_step
from tests.kernels.test_index_scores import scene, worst
from tests.kernels.test_index_topk import masked, scores_of

FREQUENCIES = rope.rope_frequencies(rope_dim=64, theta=1e4, scaling=None)


def rotations() -> None:
    freq = FREQUENCIES.cuda()
    for m, heads in ((3, 64), (37, 5), (300, 64)):
        x, p = torch.randn(m, heads, 512, device="cuda").bfloat16(), torch.randint(0, 2**20, (m,), device="cuda")
        y = heads_api.inverse_rope(x, p, freq)
        assert (y != rope.inverse_rope(x, p, freq)).float().mean() < 1e-4
        assert (heads_api.q_norm_rope(x, p, freq, eps=1e-6) != norm.q_norm_rope(x, p, freq, eps=1e-6)).float().mean() < 1e-4
        fp8, fp4 = heads_api.inverse_rope_fp8(x, p, freq, group=128), heads_api.inverse_rope_nvfp4(x, p, freq)
        assert torch.equal(fp8[0].view(torch.uint8), quant.quantize_fp8_rows(y, group=128)[0].view(torch.uint8))
        assert torch.equal(fp4[0], quant.quantize_nvfp4(y)[0])
        q = x[..., :128].contiguous()
        for record in ("plain", "fp8", "fp4"):
            wanted = indexer.index_query(q, p, freq, record=record)
            assert (index_query(q, p, freq, record=record) != wanted).float().mean() < 1e-3


def keys() -> None:
    """Window keys, entries and index keys into shared pages, with rows that have no slot, and back."""
    freq = FREQUENCIES.cuda()
    for kind, dim, records in (("kv", 512, ("plain", "fp8", "nvfp4")), ("index", 128, ("plain", "fp8", "fp4"))):
        x, weight = torch.randn(37, dim, device="cuda").bfloat16(), torch.rand(dim, device="cuda").bfloat16()
        positions, slots = torch.arange(37, device="cuda") * 1000, torch.randperm(64, device="cuda")[:37]
        slots[::6] = -1
        for record in records:
            common = dict(num_pages=2, page_size=32, dim=dim, dtype=torch.bfloat16, device="cuda")
            pages = allocate_kv_pages(record, rope_dim=64, **common) if kind == "kv" else allocate_index_pages(record, **common)
            want, how = pages.clone(), dict(eps=1e-6, record=record, page_size=32)
            write_keys(x, weight, positions, freq, pages, slots, kind=kind, **how)
            reference = cache.cache_write if kind == "kv" else indexer.index_key_write
            reference(x, weight, positions, freq, want, slots, **how)
            assert (pages != want).sum() <= 64
            if kind == "kv":
                where = dict(record=record, page_size=32, dim=512, rope_dim=64)
                assert torch.equal(read_keys(pages, slots, **where), cache.cache_read(pages, slots, **where))


def indexers() -> None:
    for record in ("plain", "fp8", "fp4"):
        shared, divided = (IndexScoresConfig(record, 64, 32, n, 2, 4, divided=n == 1) for n in (4, 1))
        for config in (None, shared, divided):
            args = scene(record, [300, 70, 5], [3, 4, 2], device="cuda")
            y = index_scores(*args, record=record, page_size=32, max_entries=305, config=config)
            assert worst(args, y, record, 32) < 1.0
    for rows, entries, most in ((10, 1000, 1000), (10, 5000, 5000), (2, 40000, 40000), (40, 40000, 40000), (40, 40000, 9000)):
        s, n = masked(scores_of(entries, 0, "cuda", rows))
        n = n.clamp(max=most)
        assert torch.equal(index_topk(s, n, k=512), indexer.index_topk(s, n, k=512))


def compressors() -> None:
    """A short step, then a long one that starts in the middle of a block and runs over the ring."""
    for ratio, overlap, key, record in ((4, True, "kv", "nvfp4"), (4, True, "index", "fp4"), (128, False, "kv", "fp8")):
        scene = Scene(ratio, overlap, key, record, True, 2 * ratio + 4, 600, 3, device="cuda")
        scene.step([(1, 70), (0, 3), (2, 129)])
        scene.config = long_step(scene)
        scene.step([(2, 1), (0, 270), (1, 60)])
        scene.check()


def attentions() -> None:
    """Heads of two tiles are a pair of CTAs'; parts meet in a cluster, or are too many for one."""
    for record, kind, heads, parts in (
        ("fp8", "chosen", 64, 2),
        ("plain", "window", 64, 5),
        ("fp8", "chosen", 64, 13),
        ("nvfp4", "visible", 64, 1),
        ("plain", "window", 64, 1),
        ("fp8", "chosen", 128, 2),
        ("nvfp4", "visible", 72, 1),
    ):
        case = make_case(record, kind, [(700, 2), (130, 1)], heads, k=200, device="cuda")
        judge(case, case.run(parts))
        judge(case, case.run(parts, unpack=True))
    for record, kind, heads in (("fp8", "visible", 64), ("plain", "visible", 128), ("nvfp4", "window", 64)):
        case = make_case(record, kind, [(7300, 5), (130, 2)], heads, device="cuda")
        judge(case, run_shared(case))
        judge(in_order(case), run_resident(in_order(case)))


if __name__ == "__main__":
    torch.manual_seed(0)
    rotations()
    keys()
    indexers()
    compressors()
    attentions()
    torch.cuda.synchronize()
    print("all as the reference has it")
