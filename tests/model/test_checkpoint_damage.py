"""Damaged checkpoints and configurations: each is refused with an error that names the damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsv4lab.config import CSA, HASH, HCA, SCORE, SWA, ConfigError, ModelConfig
from dsv4lab.model.checkpoint import CheckpointError, open_checkpoint, quantize_checkpoint, random_items, write_checkpoint
from dsv4lab.model.checkpoint.writer import packed_tensors

CONFIG = replace(
    ModelConfig.nano(),
    vocab_size=32,
    hidden_size=64,
    layer_kinds=(SWA, CSA, HCA),
    router_kinds=(HASH, SCORE, SCORE),
    num_attention_heads=2,
    head_dim=64,
    q_lora_rank=32,
    o_lora_rank=16,
    index_n_heads=2,
    index_head_dim=64,
    n_routed_experts=2,
    moe_intermediate_size=32,
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Healthy checkpoints: official in shards, full NVFP4 in shards, and one plain file without an index."""
    root = tmp_path_factory.mktemp("sources")
    for layout in ("official", "nvfp4"):
        items = random_items(CONFIG, layout=layout, seed=0)
        write_checkpoint(root / layout, CONFIG, items, layout=layout, max_shard_bytes=90_000)
    plain: dict[str, torch.Tensor] = {}
    for name, value in random_items(CONFIG, layout="f32", seed=0):
        plain |= {name: value} if isinstance(value, torch.Tensor) else packed_tensors(name, value)
    (root / "plain").mkdir()
    save_file(plain, root / "plain" / "model.safetensors")
    shutil.copy(root / "official" / "config.json", root / "plain")
    out = [root / name for name in ("official", "nvfp4", "plain")]
    for directory in out:
        read_everything(directory)
    return out


def read_everything(directory: Path) -> None:
    for _ in open_checkpoint(directory).items(progress=False):
        pass


# ---- editing files ---------------------------------------------------------------------------------------------------
def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def holder(directory: Path, name: str) -> Path:
    return next(p for p in shards(directory) if name in split(p)[0])


# ---- one error names everything --------------------------------------------------------------------------------------
def test_one_error_lists_every_problem(tmp_path: Path, sources: list[Path]) -> None:
    directory = tmp_path / "ck"
    shutil.copytree(sources[0], directory)
    files = shards(directory)
    assert len(files) >= 5
    files[-1].unlink()
    files[-2].write_bytes(files[-2].read_bytes()[:-100])
    files[-3].write_bytes(b"\xff" * 5)

    def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        header, data = split(file)
        edit(header)
        join(file, header, data)

    first = split(files[0])[0]
    matrix = next(n for n in first if n.endswith("attn.wq_a.weight"))
    vector = next(n for n in first if n.endswith("q_norm.weight"))
    sink = next(n for n in first if n.endswith("attn_sink"))
    norm = next(n for n in first if n.endswith("kv_norm.weight"))
    change(files[0], lambda h: h[matrix].update(shape=h[matrix]["shape"][::-1]))
    change(files[0], lambda h: h[vector].update(dtype="F16"))
    change(files[0], lambda h: h.update(unheard_of=h.pop(norm)))
    change(files[0], lambda h: h[sink].update(dtype="I32"))

    def index(value: dict[str, Any]) -> None:
        del value["weight_map"][norm]
        value["weight_map"]["unheard_of"] = files[0].name
        value["weight_map"]["escape"] = "../other.safetensors"
        value["weight_map"]["absolute"] = "/etc/passwd"
        value["weight_map"]["program"] = "model.bin"
        value["weight_map"]["not_there"] = files[0].name

    edit_json(directory / INDEX, index)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    for part in (
        f"{files[-1].name}: missing shard",
        f"{files[-2].name}: ",
        "truncated file: data ends at byte",
        f"{files[-3].name}: truncated or damaged",
        f"{matrix}: shape must be [32, 64]",
        f"{vector}: dtype must be BF16 or F32, got F16",
        f"{sink}: dtype must be F32 or BF16, got I32",
        f"{norm}: missing",
        "unheard_of: unexpected tensor",
        "'../other.safetensors': unsafe file name",
        "'/etc/passwd': unsafe file name",
        "'model.bin': unsafe file name",
        f"not_there: the index says {files[0].name}, which lacks it",
    ):
        assert part in message, part
    assert len(caught.value.problems) == 12  # nothing is reported twice, and no tensor of a broken file is called missing
    assert all(problem in message for problem in caught.value.problems)


def test_links_may_not_leave_the_checkpoint_except_into_a_hub_cache(tmp_path: Path, sources: list[Path]) -> None:
    outside = tmp_path / "secret.safetensors"
    shutil.copy(sources[2] / "model.safetensors", outside)
    for name in ("linked", "snapshots/revision"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(sources[2] / "config.json", tmp_path / name)
    (tmp_path / "linked" / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unsafe path: links outside"):
        open_checkpoint(tmp_path / "linked")
    (tmp_path / "blobs").mkdir()
    shutil.move(outside, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshots" / "revision" / "model.safetensors").symlink_to("../../blobs/1234")
    encoding = tmp_path / "snapshots" / "revision" / "encoding"
    encoding.mkdir()
    (encoding / "code.py").symlink_to("../../../blobs/1234")
    quantize_checkpoint(encoding.parent, tmp_path / "copy", layout="bf16", progress=False)
    assert (tmp_path / "copy" / "encoding" / "code.py").is_file()


def test_files_that_are_no_files(tmp_path: Path, sources: list[Path]) -> None:
    for name in ("pipe", "folder", "nothing"):
        (tmp_path / name).mkdir()
        shutil.copy(sources[2] / "config.json", tmp_path / name)
    os.mkfifo(tmp_path / "pipe" / "model.safetensors")  # opening it would wait for ever
    (tmp_path / "folder" / "model.safetensors").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no .*index\.json and no \*\.safetensors"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path / "absent")
    shutil.copy(sources[2] / "model.safetensors", tmp_path / "nothing" / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: missing shard"):
        open_checkpoint(tmp_path / "nothing")


def test_a_file_that_breaks_after_opening(tmp_path: Path, sources: list[Path]) -> None:
    shutil.copytree(sources[2], tmp_path / "ck")
    checkpoint = open_checkpoint(tmp_path / "ck")
    path = tmp_path / "ck" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="file ends at byte"):
        list(checkpoint.items(progress=False))
    path.unlink()
    with pytest.raises(CheckpointError, match="not readable"):
        list(checkpoint.items(progress=False))


def test_a_broken_file_without_an_index_is_one_problem(tmp_path: Path, sources: list[Path]) -> None:
    shutil.copytree(sources[2], tmp_path / "ck")
    append(random.Random(0), tmp_path / "ck")
    with pytest.raises(CheckpointError, match="bytes at the end belong to no tensor") as caught:
        open_checkpoint(tmp_path / "ck")
    assert len(caught.value.problems) == 1


def test_a_configuration_of_another_size_is_refused_quickly(tmp_path: Path, sources: list[Path]) -> None:
    shutil.copytree(sources[0], tmp_path / "ck")
    edit_json(tmp_path / "ck" / "config.json", lambda c: c.update(n_routed_experts=1 << 24))
    with pytest.raises(CheckpointError, match=r"config\.json: describes over \d+ tensors, the files hold"):
        open_checkpoint(tmp_path / "ck")


# ---- fuzz ------------------------------------------------------------------------------------------------------------
def header_flip(rng: random.Random, directory: Path) -> None:
    """One bit of the header, outside the free text of __metadata__."""
    path = rng.choice(shards(directory))
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    free = data.find(b'"format":"pt"')
    while True:
        at = rng.randrange(8, 8 + length)
        if not free <= at < free + 13:
            break
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def length_flip(rng: random.Random, directory: Path) -> None:
    path = rng.choice(shards(directory))
    data = bytearray(path.read_bytes())
    data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(rng: random.Random, directory: Path) -> None:
    path = rng.choice(shards(directory))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def append(rng: random.Random, directory: Path) -> None:
    with rng.choice(shards(directory)).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def header_entry(rng: random.Random, directory: Path) -> None:
    """One entry deleted, renamed, doubled, or with another dtype, shape or place."""
    path = rng.choice(shards(directory))
    header, data = split(path)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    nasty = [None, True, "x", -1, 1.5, [], {}, 1 << 63, 10**30, [-1], ["64"], [1 << 40, 1 << 40], [[1]], [None, 2]]
    kind = rng.randrange(8)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[name + rng.choice(["x", ".weight", " "])] = header.pop(name)
    elif kind == 2:
        text = json.dumps(header)
        text = text[:-1] + "," + json.dumps({name: entry})[1:]
        return join(path, text.encode(), data)
    elif kind == 3:
        wide = {"F32": ["I32", "U32"], "BF16": ["F16", "I16"], "I64": ["F64", "U64"], "F8_E4M3": ["F8_E5M2", "F8_E8M0", "BOOL"]}
        same_size = wide.get(entry["dtype"], ["F8_E5M2", "BOOL"])
        entry["dtype"] = rng.choice([*same_size, "F4", "", 7, None, "f32", ["F32"]])
    elif kind == 4:
        shape = entry["shape"]
        changed = [*shape, 1] if len(shape) < 2 or shape[0] == shape[1] else shape[::-1]
        changed = [2, *changed] if changed == [1] else changed  # a scalar may be stored as one element
        entry["shape"] = rng.choice([changed, [n + 1 for n in shape] or [3], *nasty[:5], *nasty[6:]])
    elif kind == 5:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[start + 1, end + 1], [start, end + 8], [end, start], [0], *nasty])
    elif kind == 6:
        entry.pop(rng.choice(list(entry)))
    else:
        header[name] = rng.choice(nasty)
    return join(path, header, data)


def swap_places(rng: random.Random, directory: Path) -> None:
    """Two tensors of different sizes exchange their byte ranges."""
    path = rng.choice(shards(directory))
    header, data = split(path)
    names = [n for n in header if n != "__metadata__"]
    while True:
        a, b = (header[rng.choice(names)] for _ in range(2))
        sizes = [e["data_offsets"][1] - e["data_offsets"][0] for e in (a, b)]
        if sizes[0] != sizes[1]:
            break
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    join(path, header, data)


def drop_part(rng: random.Random, directory: Path) -> None:
    """A tensor consistently removed from its file and from the index, as a bad export would."""
    path = rng.choice(shards(directory))
    header, data = split(path)
    name = rng.choice([n for n in header if n != "__metadata__"])
    start, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [o - (end - start) for o in entry["data_offsets"]]
    join(path, header, data[:start] + data[end:])
    if (directory / INDEX).exists():
        edit_json(directory / INDEX, lambda index: index["weight_map"].pop(name))


def values(rng: random.Random, directory: Path) -> None:
    """Data that no model can have: an expert id out of range, a global scale that is not a positive number."""
    candidates = [("layers.0.ffn.gate.tid2eid", torch.tensor([rng.choice([-1, 2, 1 << 40])]))]
    if directory.name.startswith("nvfp4"):
        bad = torch.tensor([rng.choice([0.0, -1.0, float("nan"), float("inf")])])
        candidates.append((f"layers.{rng.randrange(3)}.attn.wkv.weight_scale_2", bad))
    name, value = rng.choice(candidates)
    path = holder(directory, name)
    header, data = split(path)
    start, end = header[name]["data_offsets"]
    at = start + value.nbytes * rng.randrange((end - start) // value.nbytes)
    join(path, header, data[:at] + value.view(torch.uint8).numpy().tobytes() + data[at + value.nbytes :])


def index_edit(rng: random.Random, directory: Path) -> None:
    path = directory / INDEX
    if not path.exists():
        return truncate(rng, directory)
    kind = rng.randrange(6)
    if kind == 0:
        text = path.read_text()
        path.write_text(text[: rng.randrange(len(text) - 2)])
        return None
    if kind == 1:
        path.write_text(rng.choice(["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\0", "1"]))
        return None

    def change(index: dict[str, Any]) -> None:
        weight_map = index["weight_map"]
        name = rng.choice(list(weight_map))
        if kind == 2:
            del weight_map[name]
        elif kind == 3:
            others = [p.name for p in shards(directory) if p.name != weight_map[name]]
            weight_map[name] = rng.choice([*others, "model-00099-of-00099.safetensors"])
        elif kind == 4:
            bad = [
                "../a.safetensors",
                "/a.safetensors",
                "a/../../b.safetensors",
                "",
                ".",
                "..",
                "config.json",
                "a\0.safetensors",
            ]
            weight_map[name] = rng.choice([*bad, "x" * 300 + ".safetensors", "\ud800.safetensors", 1, None, [], {"a": 1}])
        else:
            weight_map[name + ".more"] = weight_map[name]

    edit_json(path, change)
    return None


def lose_shard(rng: random.Random, directory: Path) -> None:
    path = rng.choice(shards(directory))
    path.unlink()
    kind = rng.randrange(4)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/etc/passwd")
    elif kind == 3:
        path.symlink_to(path.name)  # a loop


def config_value(rng: random.Random, directory: Path) -> None:
    """A required key with a value of the wrong type, out of bounds, or at odds with the tensors; or no such key."""
    nasty: list[Any] = ["64", [64], {"a": 1}, True, None, -1, -0.5, 1 << 60, 10**400, 1e300, float("nan"), float("inf"), 0]

    def change(config: dict[str, Any]) -> None:
        shaping = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank"]
        shaping += ["o_lora_rank", "index_n_heads", "index_head_dim", "n_routed_experts", "num_experts_per_tok"]
        shaping += ["moe_intermediate_size", "hc_mult", "num_hash_layers", "num_nextn_predict_layers"]
        counts = [
            "o_groups",
            "sliding_window",
            "index_topk",
            "qk_rope_head_dim",
            "hc_sinkhorn_iters",
            "max_position_embeddings",
        ]
        reals = ["hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta", "swiglu_limit", "routed_scaling_factor"]
        fixed = ["model_type", "scoring_func", "topk_method", "hidden_act", "norm_topk_prob", "tie_word_embeddings"]
        kind = rng.randrange(6)
        if kind == 0:
            key = rng.choice(shaping)
            config[key] += rng.choice([1, 2, 3])
        elif kind == 1:
            key = rng.choice(shaping + counts)
            zero_counts = key in ("num_hash_layers", "num_nextn_predict_layers")
            config[key] = rng.choice([n for n in nasty if n != 0 or not zero_counts] + [config[key] + 0.5])
        elif kind == 2:
            config[rng.choice(reals)] = rng.choice(nasty)
        elif kind == 3:
            config[rng.choice(fixed)] = rng.choice(["other", 0, 1, None, [], 2.5])
        elif kind == 4:
            del config[rng.choice(shaping + counts + reals + ["compress_ratios"])]
        else:
            ratios = config["compress_ratios"]
            bad = [
                ratios[:2],
                ratios[::-1],
                [4, *ratios[1:]],
                [3, *ratios[1:]],
                ["0", *ratios[1:]],
                [0.0, *ratios[1:]],
                4,
                None,
            ]
            key, value = rng.choice(
                [
                    ("compress_ratios", rng.choice(bad)),
                    ("rope_scaling", rng.choice(["yarn", 4, [], {"type": "linear"}, {"type": "yarn"}])),
                ]
            )
            config[key] = value

    edit_json(directory / "config.json", change)


def config_text(rng: random.Random, directory: Path) -> None:
    path = directory / "config.json"
    text = path.read_text()
    broken = [text[: rng.randrange(len(text) - 2)], "", "[]", "null", "[" * 100_000, text.replace(":", "", 1), "{}", "\0" * 10]
    doubled = text.rstrip()[:-1] + ', "hidden_size": 128}'
    path.write_text(rng.choice([*broken, doubled]))


DAMAGES = [
    header_flip,
    length_flip,
    truncate,
    append,
    header_entry,
    header_entry,
    swap_places,
    drop_part,
    values,
    index_edit,
    lose_shard,
    config_value,
    config_value,
    config_text,
]


@pytest.mark.parametrize("batch", range(10))
def test_300_damaged_checkpoints_are_refused(tmp_path: Path, sources: list[Path], batch: int) -> None:
    for seed in range(30 * batch, 30 * batch + 30):
        rng = random.Random(seed)
        damage = DAMAGES[seed % len(DAMAGES)]
        source = rng.choice(sources)
        directory = tmp_path / f"{source.name}-{seed}"
        shutil.copytree(source, directory)
        damage(rng, directory)
        try:
            read_everything(directory)
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) > 20 and not (isinstance(error, CheckpointError) and not error.problems)
        else:
            pytest.fail(f"seed {seed}: {damage.__name__} on {source.name} was not noticed ({directory})")
        shutil.rmtree(directory)
