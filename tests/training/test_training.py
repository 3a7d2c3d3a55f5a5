"""The training side agrees with dsv4lab: one mathematics, one rounding, one tokenizer, and a complete export."""

from __future__ import annotations

import lzma
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv4lab
from dsv4lab.config import ModelConfig
from dsv4lab.formats import PackedWeight
from dsv4lab.lab.perplexity import held_out_files
from dsv4lab.model.cache import Batch
from dsv4lab.model.checkpoint import CheckpointError, convert_items, inventory, open_checkpoint
from dsv4lab.model.model import Model
from dsv4lab.model.numerics import EXACT
from dsv4lab.reference import quant
from training import export_nano, fakequant, verify_nano
from training.data import load_tokenizer, stdlib_files
from training.model import (
    Params,
    Run,
    forward,
    initial_parameters,
    initial_state,
    official_state,
    parameter_shapes,
    stacked_state,
)
from training.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS
from training.train_nano import Settings, Trainer


def small_config(index_topk: int) -> ModelConfig:
    """All layer kinds and both routers, small; `index_topk` entries are kept."""
    return replace(
        ModelConfig.nano(),
        vocab_size=97,
        hidden_size=64,
        head_dim=128,
        num_attention_heads=2,
        q_lora_rank=32,
        o_lora_rank=16,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=index_topk,
        n_routed_experts=5,
        moe_intermediate_size=32,
    )


def random_parameters(config: ModelConfig, seed: int) -> tuple[Params, Params]:
    """Initial values, stirred so that norms, sinks, scales and router biases matter too."""
    g = torch.Generator().manual_seed(seed)
    params, state = initial_parameters(config, g), initial_state(config, g)
    for name, w in [*params.items(), *state.items()]:
        if w.dim() == 1:
            w += 0.3 * torch.randn(w.shape, generator=g)
        elif name.endswith(("wq_b.weight", "_fn")):
            w *= 3.0
    return params, state


def lab_model(params: Params, state: Params, config: ModelConfig) -> Model:
    model = Model(config, EXACT, dtype=torch.float32, device="cpu")
    for name, value in convert_items(official_state(params, state).items(), config, layout="f32"):
        model.assign(name, value)
    return model.eval()


@pytest.mark.parametrize(("topk", "length", "seed"), [(64, 131, 0), (8, 301, 1), (4, 77, 2)])
def test_the_twin_is_the_model(topk: int, length: int, seed: int) -> None:
    """Next-token and MTP logits on the same float32 weights; the second and third case select fewer entries than there are."""
    config = small_config(topk)
    params, state = random_parameters(config, seed)
    ids = torch.randint(config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        twin = forward({**params, **state}, ids[:, :-1], config, Run(), ids[:, 1:])
        model = lab_model(params, state, config)
        cache = model.new_cache(max_seqs=1, max_tokens=length, max_step=length)
        seq = cache.open()
        batch, streams = model.run_step(cache, [(seq, ids[0, :-1].tolist())])
        want = model.head_logits(streams)
        cache = model.new_cache(max_seqs=1, max_tokens=length, max_step=length)
        seq = cache.open()
        cache.reserve(seq, length)
        batch = Batch.plan(cache, [(seq, ids[0, :-1].tolist())])
        _, want_mtp = model.predict_next(streams, ids[0, 1:], batch)
    assert twin.mtp_logits is not None
    for got, expected in ((twin.logits[0], want), (twin.mtp_logits[0], want_mtp)):
        assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_top_k_changes_the_twin() -> None:
    """The comparison above would hold trivially if selection never took an entry away."""
    config = small_config(8)
    params, state = random_parameters(config, 1)
    ids = torch.randint(config.vocab_size, (1, 301), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sparse = forward({**params, **state}, ids, config, Run()).logits
        dense = forward({**params, **state}, ids, config, Run(sparse=False)).logits
    assert torch.equal(sparse[:, :32], dense[:, :32])
    assert (sparse - dense).abs().max() > 1e-3 * dense.std()


def test_every_parameter_learns() -> None:
    """A gradient reaches each tensor, through quantised activations and weights; the indexer's through its own loss."""
    config = small_config(8)
    params, state = random_parameters(config, 3)
    params = {n: w.requires_grad_() for n, w in params.items()}
    ids = torch.randint(config.vocab_size, (1, 301), generator=torch.Generator().manual_seed(3))
    weights = {**fakequant.fake_weights(params, "nvfp4"), **state}
    out = forward(weights, ids[:, :-1], config, Run(quantised=True), ids[:, 1:])
    assert out.mtp_logits is not None
    (out.logits.logsumexp(-1).mean() + out.mtp_logits.logsumexp(-1).mean() + out.index_loss).backward()
    silent = [n for n, w in params.items() if w.grad is None or not w.grad.isfinite().all() or not w.grad.any()]
    assert silent == []


# ---- rounding --------------------------------------------------------------------------------------------------------
def awkward(rows: int, columns: int, scale: float, seed: int) -> torch.Tensor:
    """Random values with a row of zeros, a block of zeros and a row that is a million times smaller."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    x[0] = 0
    x[1, :16] = 0
    x[2] *= 1e-6
    return x


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_fake_quantisation_is_the_reference_bit_for_bit(scale: float) -> None:
    x, odd = awkward(71, 256, scale, 0), awkward(301, 200, scale, 1)
    assert torch.equal(fakequant._mxfp4(x), quant.fake_mxfp4(x))
    assert torch.equal(fakequant._nvfp4(x, fakequant.nvfp4_amax(x)), quant.fake_nvfp4(x))
    assert torch.equal(fakequant._fp8_tiles(odd), quant.dequantize_fp8_blocks(*quant.quantize_fp8_blocks(odd)))
    assert torch.equal(fakequant.fp8_rows(x, 128), quant.fake_fp8_rows(x, group=128))
    assert torch.equal(fakequant.fp8_rows(x, 64), quant.fake_fp8_rows(x, group=64))


def test_fake_official_weights_are_those_of_the_exported_checkpoint() -> None:
    """What training saw of every tensor is what the official file will hold of it."""
    config = ModelConfig.nano()
    params, state = random_parameters(config, 4)
    seen = official_state(fakequant.official_weights(params), state)
    for name, value in convert_items(official_state(params, state).items(), config, layout="official"):
        stored = quant.dequantize(value) if isinstance(value, PackedWeight) else value
        assert torch.equal(stored.to(seen[name].dtype), seen[name]), name


def test_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    (fakequant.fp4_rows(x) * 3.0).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


# ---- parameters, data, tokenizer -------------------------------------------------------------------------------------
def test_state_round_trip() -> None:
    config = small_config(8)
    params, state = random_parameters(config, 5)
    again, again_state = stacked_state(official_state(params, state), config)
    assert set(again) == set(parameter_shapes(config))
    assert all(torch.equal(again[n], w) for n, w in params.items())
    assert set(again_state) == set(state)
    assert all(torch.equal(again_state[n], w) for n, w in state.items())


def test_split_is_a_matter_of_the_path_alone(tmp_path: Path) -> None:
    for root, names in ((tmp_path / "a", range(400)), (tmp_path / "b", reversed(range(0, 400, 2)))):
        for i in names:
            path = root / f"package{i % 7}" / f"module{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"x = {i}\n" if root.name == "a" else f"y = {i}\n")
    first = {f.path: f.held_out for f in stdlib_files(tmp_path / "a")}
    second = {f.path: f.held_out for f in stdlib_files(tmp_path / "b")}
    assert first == {f.path: f.held_out for f in stdlib_files(tmp_path / "a")}
    assert len(first) == 400
    assert len(second) == 200
    assert second == {path: first[path] for path in second}
    assert 0 < sum(first.values()) < 40  # one in fifty is 8


def test_corpus_leaves_out_what_is_not_text_of_the_library(tmp_path: Path) -> None:
    for name in ("site-packages/a.py", "encodings/b.py", "kept.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_bytes(b"")
    assert [f.path for f in stdlib_files(tmp_path)] == ["kept.py"]


def test_packaged_held_out_text_was_not_trained_on(tmp_path: Path) -> None:
    record = export_nano.read_record()
    assert set(held_out_files()) <= set(record["corpus"]["held_out_files"])
    for name, text in held_out_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert all(f.held_out for f in stdlib_files(tmp_path))


def test_tokenizer_of_the_shipped_model() -> None:
    tokenizer = load_tokenizer(dsv4lab.nano())
    config = ModelConfig.nano()
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (config.bos_token_id, config.eos_token_ids) == (BOS, (EOS,))
    assert SPECIAL_TOKENS[PAD] == "<\uff5c\u2581pad\u2581\uff5c>"
    text = "def f(x):\n\treturn '\u00e9\U0001f600' + 12345\r\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    for cut in (4, 6, 10):  # between two pieces: the ids of the parts are the ids of the whole
        assert tokenizer.encode(text[:cut]).ids + tokenizer.encode(text[cut:]).ids == ids


def test_short_windows_begin_at_lines(tmp_path: Path) -> None:
    """Half of them, within chance, at a line that begins with no space."""
    tokenizer = load_tokenizer(dsv4lab.nano())
    ids = np.asarray(
        tokenizer.encode("def f(x):\n    y = x\n    return y\n\n\nclass C:\n    pass\n" * 400).ids, dtype=np.uint16
    )
    with lzma.open(tmp_path / "tokens.xz", "wb") as stream:
        np.savez(stream, train=ids, train_starts=np.zeros(1, dtype=np.int64), heldout=ids)
    (tmp_path / "tokenizer.json").write_bytes((dsv4lab.nano() / "tokenizer.json").read_bytes())
    args = Namespace(out=tmp_path, device="cpu", minutes=1.0, data=tmp_path, seed=0, resume=None)
    trainer = Trainer(args, Settings(tokens_per_step=128 * 64, short_length=64, eval_windows=2))
    rows = trainer.short_batch()
    assert rows.shape == (128, 66)
    texts = [tokenizer.decode(row.tolist()) for row in rows]
    starts = ("def", "class", "    y", "    return", "    pass")
    assert all(t.startswith(starts) for t in texts)
    assert 30 < sum(t.startswith(("def", "class")) for t in texts) < 128


# ---- export ----------------------------------------------------------------------------------------------------------
def test_shipped_folder_is_small_and_complete() -> None:
    assert export_nano.folder_bytes(dsv4lab.nano()) < export_nano.MAX_FOLDER_BYTES
    checkpoint = open_checkpoint(dsv4lab.nano())
    assert checkpoint.layout == "official"
    assert checkpoint.config == ModelConfig.nano()
    assert set(checkpoint.specs) == {n for n, s in inventory(ModelConfig.nano(), "official").items() if not s.optional}
    assert [p.name for p in checkpoint.files] == ["model.safetensors"]


def test_export_replaces_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "nano"
    for seed in (6, 7):
        params, state = random_parameters(ModelConfig.nano(), seed)
        assert export_nano.export(official_state(params, state), dsv4lab.nano(), out) == export_nano.folder_bytes(out)
    assert torch.equal(open_checkpoint(out).read("layers.1.ffn.gate.bias"), state["layers.1.ffn.gate.bias"])
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    broken = official_state(params, state)
    del broken["layers.2.attn.wkv.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.wkv\.weight"):
        export_nano.export(broken, dsv4lab.nano(), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == kept
    assert [p.name for p in tmp_path.iterdir()] == ["nano"]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 12), (torch.float32, 8), (torch.bfloat16, 4), (torch.bfloat16, 2)])
def test_rounding_is_to_the_nearest_even_of_the_kept_bits(dtype: torch.dtype, bits: int) -> None:
    """Against arithmetic on the significands in float64; halves, powers of two, zeros and subnormal numbers among them."""
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(8)) * 3).to(dtype)
    steps = torch.arange(-64, 64, dtype=torch.float64) / 2 ** (bits + 1)
    x = torch.cat([x, (1 + steps).to(dtype), (-1 - steps).to(dtype), torch.tensor([0.0, -0.0, 1.0, -2.0], dtype=dtype)])
    got = export_nano.rounded(x, bits)
    significand, exponent = torch.frexp(x.double())
    want = torch.ldexp((significand * 2 ** (bits + 1)).round(), exponent - bits - 1)  # torch rounds halves to even
    assert got.dtype == dtype
    assert torch.equal(got.double(), want)
    assert torch.equal(got.signbit(), x.signbit())
    assert not torch.equal(got, x)
    assert torch.equal(export_nano.rounded(got, bits), got)
    tiny = torch.tensor([2.0**-126 * 0.5], dtype=dtype)  # subnormal, and representable with no mantissa bit beyond the kept
    assert torch.equal(export_nano.rounded(tiny, bits), tiny)


def test_rounding_refuses_what_it_would_spoil() -> None:
    with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch.float16"):
        export_nano.rounded(torch.zeros(1, dtype=torch.float16), 2)
    with pytest.raises(ValueError, match=r"bits must be in \[0, 7\] for torch.bfloat16, got 8"):
        export_nano.rounded(torch.zeros(1, dtype=torch.bfloat16), 8)
    with pytest.raises(ValueError, match="stay finite when rounded to 4 bits"):
        export_nano.rounded(torch.tensor([torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16), 4)
    with pytest.raises(ValueError, match="must be finite"):
        export_nano.rounded(torch.tensor([float("nan")]), 12)


def test_shipped_weights_are_rounded_and_exporting_them_again_changes_nothing(tmp_path: Path) -> None:
    items = dict(open_checkpoint(dsv4lab.nano()).items(progress=False))
    for pattern in export_nano.KEPT_BITS:
        assert any(re.search(pattern, name) for name in items), pattern
    for name, value in export_nano.thinned_items(items.items()):
        assert value is items[name] or torch.equal(value, items[name]), name
    export_nano.export(items, dsv4lab.nano(), tmp_path / "nano")
    assert {p.name: p.read_bytes() for p in (tmp_path / "nano").iterdir()} == {
        p.name: p.read_bytes() for p in dsv4lab.nano().iterdir()
    }


def test_nano_still_tells_tf32_from_float32() -> None:
    """Weights that float32 products take have bits that TF32's ten do not hold."""
    for name, value in open_checkpoint(dsv4lab.nano()).items(progress=False):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name.endswith("_fn"):
            assert (export_nano.rounded(value, 10) != value).float().mean() > 0.5, name


def test_an_earlier_entry_is_compared_with_another_base() -> None:
    entry = {
        "numerics": "exact",
        "perplexity": 4.0,
        "perplexity_against_bf16": 9.0,
        "loss_minus_bf16": 9.0,
        "standard_error": 1.0,
    }
    want = {"numerics": "exact", "perplexity": 4.0, "perplexity_against_bf16": 0.25, "loss_minus_bf16": 0.22314}
    assert verify_nano.against(entry, 3.2) == want


def test_record_is_thin_and_says_what_was_trained() -> None:
    assert export_nano.RECORD.stat().st_size < 12_000
    assert export_nano.CURVE.stat().st_size < 60_000
    record = export_nano.read_record()
    training, held_out = export_nano.curve_points(record)
    tokens = [row[0] for row in training]
    assert tokens == sorted(tokens)
    assert held_out[-1][1] < held_out[0][1] < training[0][1]


def test_thinning_keeps_both_ends() -> None:
    rows = [{"step": i} for i in range(100)]
    kept = export_nano.thinned(rows, 7)
    assert [kept[0], kept[-1], len(kept)] == [rows[0], rows[-1], 7]
    assert export_nano.thinned(rows, 100) is rows
