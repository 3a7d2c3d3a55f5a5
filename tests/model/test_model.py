"""The model as a whole: one result however the tokens arrive, generation, speculation, and the outer API."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4lab
from dsv4lab.config import CSA, HASH, HCA, SCORE, SWA, ModelConfig
from dsv4lab.model.checkpoint import quantize_checkpoint, random_items, write_checkpoint
from dsv4lab.model.loading import default_dtype, load
from dsv4lab.model.model import Model
from dsv4lab.model.numerics import EXACT, OFFICIAL, W4A4

CONFIG = replace(
    ModelConfig.nano(),
    vocab_size=300,
    hidden_size=96,
    layer_kinds=(HCA, CSA, SWA, CSA),
    router_kinds=(HASH, HASH, SCORE, SCORE),
    head_dim=128,
    index_topk=8,
    index_n_heads=16,
    max_position_embeddings=2048,
)
# (layout of the checkpoint, numerics, activation dtype): the three ways models are run
WAYS = {
    "plain": ("f32", "exact", torch.float32),
    "official": ("official", "official", torch.float32),
    "bfloat16": ("official", "official", torch.bfloat16),
    "w4a4": ("nvfp4", "w4a4", torch.float32),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("model")
    write_checkpoint(root / "f32", CONFIG, random_items(CONFIG, layout="f32", seed=5), layout="f32")
    for layout in ("official", "nvfp4"):
        quantize_checkpoint(root / "f32", root / layout, layout=layout, progress=False)
    return {layout: root / layout for layout in ("f32", "official", "nvfp4")}


@pytest.fixture(scope="module", params=WAYS)
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Model:
    layout, numerics, dtype = WAYS[request.param]
    return load(checkpoints[layout], numerics=numerics, dtype=dtype)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def assert_same(got: torch.Tensor, want: torch.Tensor, model: Model) -> None:
    """Bit for bit as a rule. A sum in float64 may still round the other way once in some 1e8, and a quantiser may then amplify
    it: so the bar is 1e-5 in exact numerics, and otherwise all but one token in a hundred."""
    difference = (got - want).abs().amax(-1)
    if model.numerics is EXACT:
        assert difference.max() < 1e-5
    else:
        assert (difference > 1e-5).float().mean() <= 0.01


# ---- one result however the tokens arrive ------------------------------------------------------------------------------
def test_prefill_equals_random_chunks_equals_single_tokens(model: Model) -> None:
    ids = tokens(277)
    whole = model.logits(ids)
    rng = random.Random(0)
    cache = model.new_cache(max_seqs=1, max_tokens=len(ids))
    seq, rest, pieces = cache.open(), ids.tolist(), []
    while rest:
        size = min(len(rest), rng.choice([1, 2, 3, 5, 31, 64, 130]))
        pieces.append(model.head_logits(model.run_step(cache, [(seq, rest[:size])])[1]))
        rest = rest[size:]
    assert_same(torch.cat(pieces)[None], whole, model)
    assert_same(model.logits(ids[:140], step=1), whole[:, :140], model)


def test_batch_of_different_lengths_equals_each_alone(model: Model) -> None:
    lengths = (3, 129, 200, 64)
    prompts = [tokens(n, seed=n).tolist() for n in lengths]
    cache = model.new_cache(max_seqs=len(prompts), max_tokens=sum(lengths), max_step=50)
    places = [cache.open() for _ in prompts]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(cache.lengths[s] < len(p) for s, p in zip(places, prompts, strict=True)):
        step, who = [], []
        for i, (seq, prompt) in enumerate(zip(places, prompts, strict=True)):
            if ids := prompt[cache.lengths[seq] : cache.lengths[seq] + 17 + 9 * i]:
                step.append((seq, ids))
                who.append(i)
        _, streams = model.run_step(cache, step)
        for i, part in zip(who, model.head_logits(streams).split([len(ids) for _, ids in step]), strict=True):
            rows[i].append(part)
    for prompt, got in zip(prompts, rows, strict=True):
        assert_same(torch.cat(got)[None], model.logits(prompt), model)


def test_rewind_then_other_tokens_equals_never_having_gone_there(model: Model) -> None:
    first, wrong, right = tokens(150).tolist(), tokens(9, seed=1).tolist(), tokens(30, seed=2).tolist()
    cache = model.new_cache(max_seqs=1, max_tokens=400, max_rewind=9)
    seq = cache.open()
    model.run_step(cache, [(seq, first)])
    model.run_step(cache, [(seq, wrong)])
    cache.rewind(seq, len(first))
    _, streams = model.run_step(cache, [(seq, right)])
    assert_same(model.head_logits(streams)[None], model.logits(first + right)[:, len(first) :], model)


# ---- generation --------------------------------------------------------------------------------------------------------
def test_speculation_repeats_plain_greedy_decoding(model: Model) -> None:
    prompts = [tokens(n, seed=n).tolist() for n in (1, 130, 252)]
    plain = [c.ids for c in model.complete(prompts, max_new_tokens=16, stop_ids=())]
    for num_drafts in (1, 2, 3):
        ahead = model.complete(prompts, max_new_tokens=16, stop_ids=(), num_drafts=num_drafts)
        assert [c.ids for c in ahead] == plain, num_drafts
        assert all(c.drafted[0] == c.steps or c.drafted[0] == c.steps - 1 for c in ahead)
    assert [model.generate(p, 16, stop_ids=()).tolist() for p in prompts] == plain


def test_accepted_drafts_save_steps(checkpoints: dict[str, Path]) -> None:
    """A prediction block that foresees the backbone: a model that repeats its input token, whatever it computes."""
    model = load(checkpoints["f32"])
    table = torch.nn.functional.normalize(torch.randn(CONFIG.vocab_size, CONFIG.hidden_size), dim=-1)
    model.embed.weight, model.head.weight = table * 1e4, table  # the embedding drowns every sub-layer's output
    for hc in [model.hc_head, model.mtp[0].hc_head]:
        hc.fn = hc.fn * 0
    model.mtp[0].e_proj.assign("weight", torch.eye(CONFIG.hidden_size) * 1e4)
    for norm in (model.norm, model.mtp[0].norm, model.mtp[0].enorm):
        norm.weight = torch.ones(CONFIG.hidden_size)
    out = model.complete([[7, 9]], max_new_tokens=21, num_drafts=3, stop_ids=())[0]
    assert out.ids == [9] * 21
    assert out.acceptance[0] == 1.0 and out.steps == 5  # 1 from the prompt, then 5 steps of up to 4


def test_sampling_is_seeded_and_independent_of_the_batch(model: Model) -> None:
    prompts = [tokens(n, seed=n).tolist() for n in (5, 40)]
    options = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, top_k=50, stop_ids=())
    both = model.complete(prompts, seed=3, **options)
    assert [c.ids for c in both] == [c.ids for c in model.complete(prompts, seed=3, **options)]
    assert both[1].ids == model.complete(prompts[1:], seed=4, **options)[0].ids  # request r draws with seed + r
    drawn = model.complete(prompts, seed=2**63 - 1, **options)[1].ids
    assert drawn == model.complete(prompts[1:], seed=-(2**63), **options)[0].ids
    assert both[0].ids != model.complete(prompts[:1], seed=5, **options)[0].ids


def test_stop_ids_end_a_sequence_and_are_part_of_it(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["f32"])
    ids = tokens(20)
    free = model.generate(ids, 10, stop_ids=()).tolist()
    stop = free[4]
    cut = free.index(stop) + 1
    for num_drafts in (0, 2):
        out = model.complete([ids.tolist()], max_new_tokens=10, stop_ids=[stop], num_drafts=num_drafts)[0]
        assert (out.ids, out.finish) == (free[:cut], "stop")
    assert model.complete([ids.tolist()], max_new_tokens=10, stop_ids=())[0].finish == "length"
    seen: list[int] = []
    assert model.generate(ids, 10, stop_ids=torch.tensor([stop]), on_token=seen.append).tolist() == seen == free[:cut]
    batch = model.generate(torch.stack([ids, tokens(20, seed=9)]), 10, stop_ids=[stop])
    assert batch.shape[0] == 2 and batch[0].tolist()[:cut] == free[:cut] and set(batch[0].tolist()[cut:]) <= {stop}


# ---- the outer API -----------------------------------------------------------------------------------------------------
def test_load_defaults(checkpoints: dict[str, Path]) -> None:
    plain, official = dsv4lab.load(checkpoints["f32"]), dsv4lab.load(checkpoints["official"], "cpu", torch.bfloat16)
    assert (plain.numerics, plain.dtype) == (EXACT, torch.float32)
    assert default_dtype("cpu") == default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype("cuda") == default_dtype(torch.device("cuda", 1)) == torch.bfloat16
    assert (official.numerics, official.dtype) == (OFFICIAL, torch.bfloat16)
    assert load(checkpoints["nvfp4"], numerics="w4a4").numerics is W4A4
    logits = official.logits([1, 2, 3])
    assert logits.shape == (1, 3, CONFIG.vocab_size) and logits.dtype == torch.float32
    assert plain.logits(torch.ones(2, 5, dtype=torch.int32)).shape == (2, 5, CONFIG.vocab_size)
    assert plain.generate([1, 2], 0).shape == (0,)


def test_packed_weights_are_the_files_bytes(checkpoints: dict[str, Path]) -> None:
    from safetensors import safe_open

    model = load(checkpoints["official"])
    with safe_open(next(checkpoints["official"].glob("*.safetensors")), "pt") as file:
        stored = file.get_tensor("layers.1.attn.wq_b.weight")
        expert = file.get_tensor("layers.1.ffn.experts.5.w3.scale")
    assert torch.equal(model.layers[1].attn.wq_b.codes.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(model.layers[1].ffn.experts.w3.scale[5].view(torch.uint8), expert.view(torch.uint8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.logits([]), ValueError, "at least one token"),
        (lambda m: m.logits([300]), ValueError, r"vocab_size 300\), got 300"),
        (lambda m: m.logits([-1]), ValueError, "got -1"),
        (lambda m: m.logits(torch.ones(3)), TypeError, "must be integers, got torch.float32"),
        (lambda m: m.logits(torch.ones(1, 2, 3, dtype=torch.int64)), ValueError, r"got shape \(1, 2, 3\)"),
        (lambda m: m.generate([1], -1), ValueError, r"max_new_tokens must be in \[0, .*got -1"),
        (lambda m: m.generate([1], 2048), ValueError, "max_position_embeddings 2048, got 2049"),
        (lambda m: m.generate([1], 2, temperature=-1.0), ValueError, "temperature must be >= 0"),
        (lambda m: m.generate([1], 2, top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (lambda m: m.generate([1], 2, temperature=1e39), ValueError, "finite in float32"),
        (lambda m: m.generate([1], 2, top_k=2**63), ValueError, "top_k must be in"),
        (lambda m: m.generate([1], 2, seed=1.9), TypeError, "seed must be an integer"),
        (lambda m: m.generate([1], 2, num_drafts=512), ValueError, "num_drafts must .* got 512"),
        (lambda m: m.generate([1], 2, stop_ids=[300]), ValueError, "stop_ids must be in .* got 300"),
        (lambda m: m.complete([], max_new_tokens=2), ValueError, "prompts must be"),
        (lambda m: m.complete([[[1], [2]]], max_new_tokens=2), ValueError, r"got \[2\] rows"),
        (lambda m: m.logits([[1], [2, 3]]), ValueError, "rows of one length"),
        (lambda m: m.generate([[1], [2]], 2, on_token=print), ValueError, "single sequence, got 2"),
    ],
)
def test_bad_input_is_refused_by_name(model: Model, call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(model)


def test_drafts_need_a_prediction_block(tmp_path: Path) -> None:
    config = replace(CONFIG, num_nextn_predict_layers=0)
    write_checkpoint(tmp_path / "c", config, random_items(config, layout="f32", seed=1), layout="f32")
    with pytest.raises(ValueError, match="no prediction"):
        load(tmp_path / "c").generate([1], 2, num_drafts=1)


def test_unknown_dtype_and_numerics(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="float16"):
        load(checkpoints["f32"], dtype=torch.float16)
    with pytest.raises(ValueError, match="numerics must be one of"):
        load(checkpoints["f32"], numerics="fp2")
    with pytest.raises(ValueError, match="w4a4 must have NVFP4"):
        load(checkpoints["official"], numerics="w4a4")


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_the_reference_says_the_same_on_cuda(checkpoints: dict[str, Path], way: str) -> None:
    """Of the kernels: `test_first_light`."""
    layout, numerics, dtype = WAYS[way]
    ids = tokens(261)
    on_cpu = load(checkpoints[layout], numerics=numerics, dtype=dtype)
    on_gpu = load(checkpoints[layout], numerics=numerics, dtype=dtype, device="cuda")
    prompt = ids[:130].tolist()
    with dsv4lab.backend("reference"):
        assert_same(on_gpu.logits(ids).cpu(), on_cpu.logits(ids), on_cpu)
        plain = on_gpu.generate(prompt, 16, stop_ids=())
        assert plain.tolist() == on_cpu.generate(prompt, 16, stop_ids=()).tolist()
        assert on_gpu.generate(prompt, 16, stop_ids=(), num_drafts=2).tolist() == plain.tolist()
