"""Checkpoints written and read back, converted between layouts, and read in the spellings of others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4lab.config import CSA, HASH, HCA, SCORE, SWA, ModelConfig
from dsv4lab.formats import PackedWeight
from dsv4lab.model.checkpoint import (
    LAYOUTS,
    CheckpointError,
    convert_items,
    inventory,
    mxfp4_to_nvfp4,
    open_checkpoint,
    parameters,
    quantize_checkpoint,
    random_items,
    write_checkpoint,
)
from dsv4lab.reference.quant import dequantize, quantize

CONFIG = replace(
    ModelConfig.nano(),
    vocab_size=48,
    hidden_size=96,
    layer_kinds=(SWA, CSA, HCA),
    router_kinds=(HASH, SCORE, SCORE),
    num_attention_heads=2,
    head_dim=64,
    q_lora_rank=160,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=3,
    index_head_dim=64,
    n_routed_experts=3,
    moe_intermediate_size=32,
)


def raw(value: torch.Tensor | PackedWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything there is to a parameter, down to the byte."""
    parts = value.tensors() if isinstance(value, PackedWeight) else {"plain": value}
    return {k: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for k, t in parts.items()}


def contents(directory: Path) -> dict[str, dict]:
    return {name: raw(value) for name, value in open_checkpoint(directory).items(progress=False)}


def make(directory: Path, layout: str, config: ModelConfig = CONFIG, **kwargs: int) -> Path:
    write_checkpoint(directory, config, random_items(config, layout=layout, seed=7), layout=layout, **kwargs)
    return directory


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        out |= load_file(path)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000, 1])
def test_round_trip_is_bit_identical(tmp_path: Path, layout: str, shard_bytes: int) -> None:
    made = {name: raw(value) for name, value in random_items(CONFIG, layout=layout, seed=7)}
    checkpoint = open_checkpoint(make(tmp_path / "ck", layout, max_shard_bytes=shard_bytes))
    read = {name: raw(value) for name, value in checkpoint.items(progress=True)}
    assert read == made
    assert read == {name: raw(checkpoint.read(name)) for name in made}
    assert (checkpoint.layout, checkpoint.config) == (layout, CONFIG)
    assert checkpoint.is_quantised == (layout not in ("bf16", "f32"))
    wanted = {name: spec for name, spec in inventory(CONFIG, layout).items() if not name.endswith("input_scale")}
    # An independent reader sees the same tensors, and the inventory is what lies on disk.
    tensors = all_tensors(tmp_path / "ck")
    assert set(tensors) == set(checkpoint.specs) == set(wanted)
    assert all(tuple(t.shape) == wanted[n].shape and t.nbytes == wanted[n].nbytes for n, t in tensors.items())
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    assert len(checkpoint.files) == {1 << 30: 1, 1: len(made)}.get(shard_bytes, len(checkpoint.files))
    assert shard_bytes != 50_000 or all(f.stat().st_size < 140_000 for f in checkpoint.files)
    for name, value in checkpoint.items(progress=False):
        parameter = parameters(CONFIG)[name]
        assert isinstance(value, PackedWeight) == parameter.is_matrix
        assert tuple(value.shape) == parameter.shape
        assert next(iter(raw(value).values()))[2] == raw(tensors[name])["plain"][2]
    assert not [p for p in tmp_path.iterdir() if p.name != "ck"]


def test_config_says_what_the_files_hold(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        config = json.loads((make(tmp_path / layout, layout) / "config.json").read_text())
        assert config["torch_dtype"] == ("float32" if layout == "f32" else "bfloat16")
        assert ("quantization_config" in config) == (layout not in ("bf16", "f32"))
    quant = {n: json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in LAYOUTS[:3]}
    assert quant["official"]["weight_block_size"] == [128, 128] and quant["official"]["scale_fmt"] == "ue8m0"
    assert (
        quant["nvidia"]["moe_quant_algo"] == "NVFP4" and list(quant["nvidia"]["quantized_layers"])[1] == "layers.1.ffn.experts"
    )
    assert quant["nvfp4"]["quant_algo"] == "NVFP4" and "layers.*.ffn.gate" in quant["nvfp4"]["exclude_modules"]
    manifest = json.loads((tmp_path / "nvidia" / "hf_quant_config.json").read_text())
    assert manifest["quantization"]["quantized_layers"] == quant["nvidia"]["quantized_layers"]


@pytest.mark.parametrize("src", LAYOUTS)
@pytest.mark.parametrize("dst", LAYOUTS)
def test_every_layout_converts_to_every_other(tmp_path: Path, src: str, dst: str) -> None:
    make(tmp_path / "src", src)
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    (tmp_path / "src" / "encoding" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "encoding" / "sub" / "golden.txt").write_text("x")
    (tmp_path / "src" / "encoding" / "leak").symlink_to("/etc/passwd")
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", layout=dst, progress=False)
    before, after = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "dst")
    assert after.layout == dst
    assert (tmp_path / "dst" / "encoding" / "sub" / "golden.txt").read_text() == "x"
    assert (tmp_path / "dst" / "tokenizer.json").exists() and not (tmp_path / "dst" / "encoding" / "leak").exists()
    for name in before.names:
        old, new = before.read(name), after.read(name)
        if not isinstance(old, PackedWeight):
            bound = 0.0 if dst == "f32" or old.dtype == new.dtype else 2**-8
            assert torch.allclose(old.float(), new.float(), rtol=bound, atol=0)
        elif old.format is new.format:
            assert raw(old) == raw(new)
        else:
            x, y = dequantize(old), dequantize(new)
            limit = 0 if dst == "f32" or (old.format.name, new.format.name) == ("mxfp4", "nvfp4") else 0.2
            assert ((x - y).norm() / x.norm()).item() <= limit


def test_gate_and_up_share_their_global_scale(tmp_path: Path) -> None:
    for src in ("f32", "official"):
        make(tmp_path / src, src)
        quantize_checkpoint(tmp_path / src, tmp_path / f"{src}-nvfp4", layout="nvfp4", progress=False)
        checkpoint = open_checkpoint(tmp_path / f"{src}-nvfp4")
        before = open_checkpoint(tmp_path / src)
        for base in ("layers.1.ffn.experts.2", "layers.0.ffn.shared_experts", "mtp.0.ffn.experts.0"):
            w1, w3 = (checkpoint.read(f"{base}.{w}.weight") for w in ("w1", "w3"))
            assert w1.global_scale == w3.global_scale
            if src == "f32":
                assert w1.global_scale != checkpoint.read(f"{base}.w2.weight").global_scale
                amax = max(before.read(f"{base}.{w}.weight").codes.abs().max() for w in ("w1", "w3"))
                assert w1.global_scale == amax / 2688


def test_exact_cast_keeps_nibbles_and_follows_the_spec() -> None:
    generator = torch.Generator().manual_seed(3)
    span = torch.randint(0, 17, (40, 4), generator=generator).repeat_interleave(32, 1)
    w1, w3 = (quantize(torch.randn(40, 128, generator=generator) * 2.0**-span, "mxfp4") for _ in range(2))
    w1.codes[3, :16] = 0
    w1.scale.view(torch.uint8)[3, 0] = 1  # a block of zeros with the smallest scale does not spoil the cast
    got = mxfp4_to_nvfp4([w1, w3])
    assert got is not None
    used = torch.cat([w1.scale.view(torch.uint8)[torch.arange(40) != 3], w3.scale.view(torch.uint8)])
    kmax = int(used.max()) - 127
    for old, new in zip((w1, w3), got, strict=True):
        assert torch.equal(old.codes, new.codes) and new.global_scale == 2.0 ** (kmax - 8)
        k = old.scale.view(torch.uint8).float() - 127
        want = 2.0 ** (k - kmax + 8).clamp(min=-9).repeat_interleave(2, 1)
        assert torch.equal(new.scale.float(), want)
        assert torch.equal(dequantize(old), dequantize(new))
    w3.scale.view(torch.uint8)[0, 0] = int(used.max()) - 18  # 18 binades below the largest
    w3.codes[0, 0] = 0x11
    assert mxfp4_to_nvfp4([w1, w3]) is None


def test_wide_exponents_are_requantised(tmp_path: Path) -> None:
    items = dict(random_items(CONFIG, layout="official", seed=1))
    wide = items["layers.0.ffn.experts.0.w1.weight"]
    assert isinstance(wide, PackedWeight)
    wide.scale.view(torch.uint8)[0, 0] -= 40
    write_checkpoint(tmp_path / "a", CONFIG, items.items(), layout="official")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", layout="nvidia", progress=False)
    new = open_checkpoint(tmp_path / "b").read("layers.0.ffn.experts.0.w1.weight")
    x, y = dequantize(wide), dequantize(new)
    assert 0 < ((x - y).norm() / x.norm()).item() < 0.1


def test_input_scales(tmp_path: Path) -> None:
    make(tmp_path / "src", "official")
    name = "layers.1.attn.wq_a.weight"
    amax = {name: 5.0, "layers.1.ffn.experts.0.w1.weight": 7.0}
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", layout="nvfp4", progress=False, input_amax=amax)
    checkpoint = open_checkpoint(tmp_path / "dst")
    assert {n for n in checkpoint.specs if n.endswith("input_scale")} == {n.replace("weight", "input_scale") for n in amax}
    assert checkpoint.read(name).input_scale == torch.tensor(5.0 / 2688)
    quantize_checkpoint(tmp_path / "dst", tmp_path / "again", layout="nvfp4", progress=False)
    assert contents(tmp_path / "dst") == contents(tmp_path / "again")
    for bad, rule in (({"x.weight": 1.0}, "got 'x.weight'"), ({name: 0.0}, "finite and > 0, got 0.0")):
        with pytest.raises(ValueError, match=rule):
            quantize_checkpoint(tmp_path / "src", tmp_path / "bad", layout="nvfp4", progress=False, input_amax=bad)
    with pytest.raises(ValueError, match=r"stores as nvfp4"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "bad", layout="official", progress=False, input_amax=amax)
    assert not (tmp_path / "bad").exists()


# ---- the spellings of others -----------------------------------------------------------------------------------------
def save_plain(directory: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    directory.mkdir()
    save_file({n: t.clone() for n, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_parts_of_a_matrix_in_different_shards_and_prefixed_names(tmp_path: Path) -> None:
    official = make(tmp_path / "a", "official")
    tensors = all_tensors(official)
    renamed = {
        "model." + n.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.").replace(".scale", ".weight_scale_inv"): t
        for n, t in tensors.items()
    }
    renamed["model.mtp.0.head.weight"] = torch.zeros(1)  # a duplicate that re-exports add
    (tmp_path / "b").mkdir()
    names = sorted(renamed)
    shards = {f"part{i}.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({n: renamed[n] for n in part}, tmp_path / "b" / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(official / "config.json", tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").layout == "official"
    assert contents(tmp_path / "b") == contents(official)


def test_base_releases_have_float32_scales(tmp_path: Path) -> None:
    official = make(tmp_path / "a", "official")
    tensors = all_tensors(official)
    for name, tensor in list(tensors.items()):
        if name.endswith(".scale") and ".experts." not in name:
            tensors[name] = tensor.float()
    base = save_plain(tmp_path / "b", tensors, json.loads((official / "config.json").read_text()))
    checkpoint = open_checkpoint(base)
    assert checkpoint.layout == "mixed" and checkpoint.read("layers.0.attn.wkv.weight").scale.dtype == torch.float32
    quantize_checkpoint(base, tmp_path / "c", layout="official", progress=False)
    assert contents(tmp_path / "c") == contents(official)  # power-of-two scales convert exactly
    name = "layers.0.attn.wkv"
    tensors[f"{name}.scale"] *= 1.3
    loose = save_plain(tmp_path / "d", tensors, json.loads((official / "config.json").read_text()))
    quantize_checkpoint(loose, tmp_path / "e", layout="official", progress=False)
    x, y = (dequantize(open_checkpoint(d).read(f"{name}.weight")) for d in (loose, tmp_path / "e"))
    assert 0 < ((x - y).norm() / x.norm()).item() < 0.05


def test_a_checkpoint_without_mtp_is_whole_and_half_of_one_is_not(tmp_path: Path) -> None:
    official = make(tmp_path / "a", "official")
    tensors, config = all_tensors(official), json.loads((official / "config.json").read_text())
    backbone = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    checkpoint = open_checkpoint(save_plain(tmp_path / "b", backbone, config))
    assert checkpoint.num_mtp == 0 and checkpoint.config == replace(CONFIG, num_nextn_predict_layers=0)
    quantize_checkpoint(tmp_path / "b", tmp_path / "c", layout="nvfp4", progress=False)
    assert open_checkpoint(tmp_path / "c").num_mtp == 0
    half = backbone | {n: t for n, t in tensors.items() if n.startswith("mtp.0.attn")}
    with pytest.raises(CheckpointError, match=r"mtp\.0\.e_proj\.weight: missing"):
        open_checkpoint(save_plain(tmp_path / "d", half, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_checkpoints_open(tmp_path: Path, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=128,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=1,
        index_n_heads=4,
        index_head_dim=64,
        index_topk=8,
        qk_rope_head_dim=64,
        compress_ratios=[0, 4, 128, 4, 0],
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).to(dtype)
    model.model.layers[0].mlp.gate.tid2eid.copy_(torch.randint(0, 4, (64, 2)))
    model.save_pretrained(tmp_path / "saved")
    own = save_plain(tmp_path / "own", model.state_dict(), json.loads((tmp_path / "saved" / "config.json").read_text()))
    saved = open_checkpoint(tmp_path / "saved")
    assert saved.num_mtp == 0 and not saved.is_quantised and saved.layout == ("f32" if dtype == torch.float32 else "mixed")
    assert saved.config.layer_kinds == (SWA, CSA, HCA, CSA)
    assert contents(own) == contents(tmp_path / "saved")  # the modules' own names, stacked experts included
    layer = model.model.layers[1]
    inner = config.moe_intermediate_size
    pairs = {
        "layers.1.ffn.experts.3.w1.weight": layer.mlp.experts.gate_up_proj[3, :inner],
        "layers.1.ffn.experts.3.w3.weight": layer.mlp.experts.gate_up_proj[3, inner:],
        "layers.1.ffn.experts.2.w2.weight": layer.mlp.experts.down_proj[2],
        "layers.1.attn.wo_a.weight": layer.self_attn.o_a_proj.weight,
        "layers.1.attn.indexer.wq_b.weight": layer.self_attn.compressor.indexer.q_b_proj.weight,
    }
    for name, weight in pairs.items():
        assert torch.equal(saved.read(name).codes, weight.detach())
    assert torch.equal(saved.read("layers.1.attn.kv_norm.weight"), layer.self_attn.kv_norm.weight.detach())
    quantize_checkpoint(tmp_path / "saved", tmp_path / "nvfp4", layout="nvfp4", progress=False)
    assert open_checkpoint(tmp_path / "nvfp4").layout == "nvfp4"


# ---- writing safely --------------------------------------------------------------------------------------------------
def test_writer_names_every_problem(tmp_path: Path) -> None:
    items = dict(random_items(CONFIG, layout="bf16", seed=0))
    items["layers.0.attn.wq_a.weight"] = quantize(torch.zeros(160, 96), "nvfp4")
    items["norm.weight"] = torch.zeros(5)
    del items["mtp.0.enorm.weight"]
    items["extra"] = torch.zeros(1)
    pairs = [*items.items(), ("head.weight", items["head.weight"])]
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "x", CONFIG, pairs, layout="bf16")
    text = "\n".join(caught.value.problems)
    for part in (
        "layers.0.attn.wq_a.weight: must be BF16 [160, 96], got U8 [160, 48]",
        "layers.0.attn.wq_a.weight_scale: the layout has no such tensor",
        "norm.weight: must be BF16 [96], got F32 [5]",
        "mtp.0.enorm.weight: missing",
        "extra: not a parameter",
        "head.weight: written twice",
    ):
        assert part in text and part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_existing_destination_is_refused_and_an_empty_one_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="the current directory"):
        make(Path(), "f32")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "link", "f32")
    with pytest.raises(FileExistsError, match="must not exist or be an empty directory"):
        make(tmp_path / "empty", "f32")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        quantize_checkpoint(tmp_path / "empty", tmp_path / "file", layout="bf16", progress=False)
    with pytest.raises(NotADirectoryError, match="must not be below a file"):
        quantize_checkpoint(tmp_path / "empty", tmp_path / "file" / "x", layout="bf16", progress=False)


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        for i, item in enumerate(random_items(CONFIG, layout="official", seed=0)):
            if i == 60:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "x", CONFIG, failing(), layout="official", max_shard_bytes=10_000)
    assert not list(tmp_path.iterdir())


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    src = make(tmp_path / "src", "official")
    code = f"""
import time
from dsv4lab.model.checkpoint import quantize, quantize_checkpoint
reader = quantize._read_in_pairs
def slow(*args):
    for i, item in enumerate(reader(*args)):
        if i == 100:
            print("half", flush=True)
            time.sleep(60)
        yield item
quantize._read_in_pairs = slow
quantize_checkpoint({str(src)!r}, {str(tmp_path / "dst")!r}, layout="nvfp4", progress=False, max_shard_bytes=5000)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().strip() == "half"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=30)
    left = [p for p in tmp_path.iterdir() if p.name != "src"]
    assert not (tmp_path / "dst").exists() and len(left) == 1 and left[0].name.startswith(".dst.partial-")
    assert list(left[0].iterdir()) and not list(left[0].glob("*.safetensors")) and not list(left[0].glob("*.json"))
    with pytest.raises(ValueError, match=r"config\.json"):
        open_checkpoint(left[0])
    started = time.monotonic()
    quantize_checkpoint(src, tmp_path / "dst", layout="nvfp4", progress=False)  # and the next attempt works
    assert open_checkpoint(tmp_path / "dst").layout == "nvfp4" and time.monotonic() - started < 60


def test_converting_needs_known_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="what: not a parameter"):
        list(convert_items([("what", torch.zeros(1))], CONFIG, layout="f32"))
    with pytest.raises(KeyError, match="must be a parameter"):
        open_checkpoint(make(tmp_path / "a", "f32")).read("what")
