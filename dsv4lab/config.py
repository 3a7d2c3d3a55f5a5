"""Model constants: the only home of every number that defines a DeepSeek-V4 model.

`ModelConfig` keeps the key names of the official `config.json`. It is read from a checkpoint directory in the official
spelling or in the one that Transformers writes, and written in the official spelling.
Source: the model specification, sections 1.2 to 1.4.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SWA, CSA, HCA = "SWA", "CSA", "HCA"  # attention kinds: sliding window, compressed sparse, heavily compressed
HASH, SCORE = "hash", "score"  # router kinds: by token table, by learned score

_HF_KINDS = {
    "sliding_attention": SWA,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
_HF_ROUTERS = {"hash_moe": HASH, "moe": SCORE}
_MAX_DIM = 1 << 24  # no dimension of a real model comes near; larger values are damage, and would exhaust memory
_MAX_NUMBER = 1e12  # the same for real numbers
_MAX_BYTES = 1 << 24  # of config.json
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_OFFICIAL_RATIOS = {0: SWA, 4: CSA, 128: HCA}


class ConfigError(ValueError):
    """A configuration that does not describe a DeepSeek-V4 model; the message names the key, the rule and the value."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters of the compressed layers' rotary table (spec 4.2)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """Every constant of one DeepSeek-V4 model. Dimensions are element counts; `eps` values are in x^2 units."""

    vocab_size: int
    hidden_size: int
    layer_kinds: tuple[str, ...]  # one of SWA, CSA, HCA a backbone layer; the MTP block is always SWA
    router_kinds: tuple[str, ...]  # one of HASH, SCORE a backbone layer; the MTP block is always SCORE
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    csa_ratio: int
    hca_ratio: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int

    def __post_init__(self) -> None:
        self._check()

    # ---- presets -------------------------------------------------------------------------------------------------
    @classmethod
    def flash(cls) -> ModelConfig:
        """DeepSeek-V4-Flash: 43 layers, 284B parameters."""
        kinds = (SWA, SWA, *tuple(CSA if i % 2 == 0 else HCA for i in range(2, 43)))
        return cls(
            hidden_size=4096,
            layer_kinds=kinds,
            num_attention_heads=64,
            q_lora_rank=1024,
            o_groups=8,
            index_topk=512,
            n_routed_experts=256,
            moe_intermediate_size=2048,
            routed_scaling_factor=1.5,
            **_shared(num_layers=43),
        )

    @classmethod
    def pro(cls) -> ModelConfig:
        """DeepSeek-V4-Pro: 61 layers, 1.6T parameters."""
        kinds = (HCA, HCA, *tuple(CSA if i % 2 == 0 else HCA for i in range(2, 61)))
        return cls(
            hidden_size=7168,
            layer_kinds=kinds,
            num_attention_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            index_topk=1024,
            n_routed_experts=384,
            moe_intermediate_size=3072,
            routed_scaling_factor=2.5,
            **_shared(num_layers=61),
        )

    @classmethod
    def nano(cls) -> ModelConfig:
        """The shipped model: every constant that shapes a kernel is V4's own, widths and counts are shrunk."""
        shared = _shared(num_layers=3)
        shared |= {
            "vocab_size": 512,
            "router_kinds": (HASH, SCORE, SCORE),
            "o_lora_rank": 64,
            "index_n_heads": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 1 << 16,
        }
        return cls(
            hidden_size=128,
            layer_kinds=(SWA, CSA, HCA),
            num_attention_heads=4,
            q_lora_rank=64,
            o_groups=2,
            index_topk=32,
            n_routed_experts=8,
            moe_intermediate_size=64,
            routed_scaling_factor=1.5,
            **shared,
        )

    # ---- derived -------------------------------------------------------------------------------------------------
    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def nope_head_dim(self) -> int:
        """Leading, non-rotary dims of the head."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def block_tokens(self) -> int:
        """Tokens of one cache block: the smallest count both compressors divide (128 in every release)."""
        return math.lcm(self.csa_ratio, self.hca_ratio)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def hc_mix_dim(self) -> int:
        """Outputs of one hyper-connection projection: pre, post and comb, (2 + S) * S."""
        return (2 + self.hc_mult) * self.hc_mult

    def ratio(self, kind: str) -> int:
        """Tokens per compressed entry of an attention kind; 0 for the sliding window."""
        return {SWA: 0, CSA: self.csa_ratio, HCA: self.hca_ratio}[kind]

    # ---- reading and writing -------------------------------------------------------------------------------------
    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint directory, official or Transformers spelling.

        Raises ConfigError naming the file and what is wrong with it.
        """
        path = Path(directory) / "config.json"
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ConfigError(f"{path}: must have at most {_MAX_BYTES} bytes, got {path.stat().st_size}")
            raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except ConfigError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"{path}: not found; a checkpoint directory holds config.json") from None
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not readable JSON ({error})") from None
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Any) -> ModelConfig:
        """Build from the decoded `config.json`. Unknown keys are ignored, as in every release; missing ones raise."""
        if not isinstance(raw, dict):
            raise ConfigError(f"config must be a JSON object, got {type(raw).__name__}")
        read = _Reader(raw)
        read.expect("model_type", ("deepseek_v4",))
        read.expect("scoring_func", ("sqrtsoftplus",))
        read.expect("norm_topk_prob", (True,))
        read.expect("hidden_act", ("silu",))
        read.expect("num_key_value_heads", (1,))
        read.expect("n_shared_experts", (1,))
        read.expect("tie_word_embeddings", (False,))
        read.expect("attention_bias", (False,))
        read.expect("topk_method", ("noaux_tc",))
        num_layers = read.integer("num_hidden_layers", low=1, high=4096)
        rates = read.rates()
        rope_theta, compress_theta, scaling = read.rope()
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            layer_kinds=read.layer_kinds(num_layers),
            router_kinds=read.router_kinds(num_layers),
            num_attention_heads=read.integer("num_attention_heads"),
            head_dim=read.integer("head_dim"),
            qk_rope_head_dim=read.rope_head_dim(),
            q_lora_rank=read.integer("q_lora_rank"),
            o_groups=read.integer("o_groups"),
            o_lora_rank=read.integer("o_lora_rank"),
            sliding_window=read.integer("sliding_window"),
            csa_ratio=rates[CSA],
            hca_ratio=rates[HCA],
            index_n_heads=read.integer("index_n_heads"),
            index_head_dim=read.integer("index_head_dim"),
            index_topk=read.integer("index_topk"),
            n_routed_experts=read.integer("n_routed_experts"),
            num_experts_per_tok=read.integer("num_experts_per_tok"),
            moe_intermediate_size=read.integer("moe_intermediate_size"),
            routed_scaling_factor=read.number("routed_scaling_factor"),
            swiglu_limit=read.number("swiglu_limit"),
            hc_mult=read.integer("hc_mult", high=16),
            hc_sinkhorn_iters=read.integer("hc_sinkhorn_iters", high=1000),
            hc_eps=read.number("hc_eps"),
            rms_norm_eps=read.number("rms_norm_eps"),
            rope_theta=rope_theta,
            compress_rope_theta=compress_theta,
            rope_scaling=scaling,
            max_position_embeddings=read.integer("max_position_embeddings", high=1 << 20),
            bos_token_id=read.bos_id(),
            eos_token_ids=read.eos_ids(),
            num_nextn_predict_layers=read.integer("num_nextn_predict_layers", low=0, high=16),
        )

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json` spelling; `from_dict` of it gives an equal config."""
        official = {SWA: 0, CSA: self.csa_ratio, HCA: self.hca_ratio}
        hash_layers = self.router_kinds.count(HASH)
        if self.router_kinds != (HASH,) * hash_layers + (SCORE,) * (self.num_hidden_layers - hash_layers):
            raise ConfigError(
                f"router_kinds must start with the hash layers to be written as num_hash_layers, got {self.router_kinds}"
            )
        if (self.csa_ratio, self.hca_ratio) != (4, 128):
            raise ConfigError(
                f"csa_ratio, hca_ratio must be 4, 128 to be written as compress_ratios, got {self.csa_ratio}, {self.hca_ratio}"
            )
        out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
        skipped = {"layer_kinds", "router_kinds", "csa_ratio", "hca_ratio", "eos_token_ids", "rope_scaling"}
        out |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        out |= {
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": 1,
            "n_shared_experts": 1,
            "num_hash_layers": hash_layers,
            "compress_ratios": [official[k] for k in self.layer_kinds] + [0] * self.num_nextn_predict_layers,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "rope_scaling": {"type": "yarn"} | asdict(self.rope_scaling) if self.rope_scaling else None,
        }
        return out

    # ---- validation ----------------------------------------------------------------------------------------------
    def _check(self) -> None:
        """Rules between keys; each message names the thing, the rule and the value."""

        def require(holds: bool, rule: str, value: object) -> None:
            if not holds:
                raise ConfigError(f"{rule}, got {value}")

        require(len(self.layer_kinds) > 0, "layer_kinds must name at least one layer", self.layer_kinds)
        require(set(self.layer_kinds) <= {SWA, CSA, HCA}, "layer_kinds must be SWA, CSA or HCA", self.layer_kinds)
        require(set(self.router_kinds) <= {HASH, SCORE}, "router_kinds must be hash or score", self.router_kinds)
        require(
            len(self.router_kinds) == len(self.layer_kinds),
            f"router_kinds must have one entry a layer ({len(self.layer_kinds)})",
            len(self.router_kinds),
        )
        rd, ri = self.qk_rope_head_dim, self.index_head_dim
        require(rd % 2 == 0 and 0 < rd <= self.head_dim, f"qk_rope_head_dim must be even and <= head_dim {self.head_dim}", rd)
        require(rd <= ri, f"index_head_dim must be >= qk_rope_head_dim {rd}", ri)
        require(ri & (ri - 1) == 0, "index_head_dim must be a power of two (Hadamard)", ri)
        require(
            self.num_attention_heads % self.o_groups == 0,
            f"num_attention_heads must be a multiple of o_groups {self.o_groups}",
            self.num_attention_heads,
        )
        require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"num_experts_per_tok must be <= n_routed_experts {self.n_routed_experts}",
            self.num_experts_per_tok,
        )
        require(self.csa_ratio > 1, "csa_ratio must be > 1", self.csa_ratio)
        require(self.hca_ratio > 1, "hca_ratio must be > 1", self.hca_ratio)
        require(self.block_tokens <= 1 << 16, "lcm(csa_ratio, hca_ratio) must be <= 65536", self.block_tokens)
        bos = [] if self.bos_token_id is None else [("bos_token_id", self.bos_token_id)]
        for name, value in bos + [("eos_token_id", e) for e in self.eos_token_ids]:
            require(0 <= value < self.vocab_size, f"{name} must be in [0, vocab_size {self.vocab_size})", value)
        for name in ("rope_theta", "compress_rope_theta", "swiglu_limit", "routed_scaling_factor"):
            require(getattr(self, name) > 0, f"{name} must be > 0", getattr(self, name))
        for name in ("hc_eps", "rms_norm_eps"):
            require(0 < getattr(self, name) < 1, f"{name} must be in (0, 1)", getattr(self, name))


def _shared(num_layers: int) -> dict[str, Any]:
    """Constants that Flash and Pro have in common (spec 1.1, 1.2)."""
    return {
        "vocab_size": 129280,
        "router_kinds": (HASH,) * 3 + (SCORE,) * (num_layers - 3),
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "csa_ratio": 4,
        "hca_ratio": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "num_experts_per_tok": 6,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": RopeScaling(factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0),
        "max_position_embeddings": 1 << 20,
        "bos_token_id": 0,
        "eos_token_ids": (1,),
        "num_nextn_predict_layers": 1,
    }


class _Reader:
    """Typed access to a decoded `config.json`; every failure names the key, the rule and the value."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def expect(self, key: str, allowed: tuple[object, ...]) -> None:
        """A key that must have the one value this architecture has, where it is present."""
        if key in self.raw and (
            self.raw[key] not in allowed or isinstance(self.raw[key], bool) != isinstance(allowed[0], bool)
        ):
            raise ConfigError(f"{key} must be {' or '.join(map(repr, allowed))}, got {self.raw[key]!r}")

    def integer(self, key: str, low: int = 1, high: int = _MAX_DIM) -> int:
        return _integer(key, self._get(key), low, high)

    def number(self, key: str) -> float:
        return _number(key, self._get(key))

    def _get(self, key: str) -> Any:
        if key not in self.raw:
            raise ConfigError(f"{key} is missing")
        return self.raw[key]

    def layer_kinds(self, num_layers: int) -> tuple[str, ...]:
        """`layer_types` (Transformers) or `compress_ratios` (official, with trailing entries for the MTP stages)."""
        if "layer_types" in self.raw:
            return self._kinds("layer_types", num_layers, _HF_KINDS)
        ratios = self._get("compress_ratios")
        if not isinstance(ratios, list) or len(ratios) < num_layers:
            raise ConfigError(f"compress_ratios must list at least num_hidden_layers {num_layers} entries, got {ratios!r}")
        bad = [r for r in ratios if isinstance(r, bool) or not isinstance(r, int) or r not in _OFFICIAL_RATIOS]
        if bad:
            raise ConfigError(f"compress_ratios entries must be 0, 4 or 128, got {bad[0]!r}")
        if any(ratios[num_layers:]):
            raise ConfigError(f"compress_ratios beyond layer {num_layers} (MTP stages) must be 0, got {ratios[num_layers:]}")
        return tuple(_OFFICIAL_RATIOS[r] for r in ratios[:num_layers])

    def router_kinds(self, num_layers: int) -> tuple[str, ...]:
        if "mlp_layer_types" in self.raw:
            return self._kinds("mlp_layer_types", num_layers, _HF_ROUTERS)
        count = min(self.integer("num_hash_layers", low=0), num_layers)
        return (HASH,) * count + (SCORE,) * (num_layers - count)

    def _kinds(self, key: str, num_layers: int, names: dict[str, str]) -> tuple[str, ...]:
        kinds = self.raw[key]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ConfigError(f"{key} must list num_hidden_layers {num_layers} names, got {kinds!r}")
        bad = [k for k in kinds if not isinstance(k, str) or k not in names]
        if bad:
            raise ConfigError(f"{key} entries must be one of {sorted(names)}, got {bad[0]!r}")
        return tuple(names[k] for k in kinds)

    def rates(self) -> dict[str, int]:
        rates = self.raw.get("compress_rates")
        if rates is None:
            return {CSA: 4, HCA: 128}
        if not isinstance(rates, dict):
            raise ConfigError(f"compress_rates must be an object, got {rates!r}")
        out = {}
        for hf, kind in _HF_KINDS.items():
            if kind != SWA:
                if hf not in rates:
                    raise ConfigError(f"compress_rates must have the key {hf!r}, got {sorted(rates)}")
                out[kind] = _integer(f"compress_rates.{hf}", rates[hf], 1, 1 << 16)
        return out

    def rope_head_dim(self) -> int:
        if "qk_rope_head_dim" in self.raw:
            return self.integer("qk_rope_head_dim")
        return int(self.integer("head_dim") * self.number("partial_rotary_factor"))

    def rope(self) -> tuple[float, float, RopeScaling | None]:
        """Both bases and the YaRN parameters, from `rope_scaling` or from nested or flat `rope_parameters`."""
        nested = self.raw.get("rope_parameters")
        if nested is not None and not isinstance(nested, dict):
            raise ConfigError(f"rope_parameters must be an object, got {nested!r}")
        if nested and ("main" in nested or "compress" in nested):
            for label in ("main", "compress"):
                if not isinstance(nested.get(label), dict):
                    raise ConfigError(f"rope_parameters.{label} must be an object, got {nested.get(label)!r}")
            main, compress = nested["main"], nested["compress"]
            if main.get("rope_type", "default") != "default":
                raise ConfigError(f"rope_parameters.main.rope_type must be 'default', got {main['rope_type']!r}")
            return (
                _number("rope_parameters.main.rope_theta", main.get("rope_theta")),
                _number("rope_parameters.compress.rope_theta", compress.get("rope_theta")),
                _scaling("rope_parameters.compress", compress),
            )
        key = "rope_parameters" if nested else "rope_scaling"
        return self.number("rope_theta"), self.number("compress_rope_theta"), _scaling(key, self.raw.get(key))

    def bos_id(self) -> int | None:
        """Transformers writes null where a tokenizer has no such token."""
        return None if self.raw.get("bos_token_id") is None else self.integer("bos_token_id", low=0)

    def eos_ids(self) -> tuple[int, ...]:
        value = self.raw.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(_integer("eos_token_id", v, 0, _MAX_DIM) for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that appears twice leaves open which one counts."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"{len(pairs) - len(out)} keys appear twice among {sorted(out)}")
    return out


def _integer(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{key} must be an integer in [{low}, {high}], got {value!r}")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_NUMBER:
        raise ConfigError(f"{key} must be a number of magnitude at most {_MAX_NUMBER:g}, got {value!r}")
    return float(value)


def _scaling(key: str, raw: Any) -> RopeScaling | None:
    """A rope-scaling object; None where it is absent or says `default`."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ConfigError(f"{key} must be an object or null, got {raw!r}")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{key}.type must be 'yarn' or 'default', got {kind!r}")
    if _number(f"{key}.attention_factor", raw.get("attention_factor", 1.0)) != 1.0:
        raise ConfigError(f"{key}.attention_factor must be 1 (V4 applies no mscale), got {raw['attention_factor']!r}")
    factor = _number(f"{key}.factor", raw.get("factor"))
    # Transformers leaves the two out where they have its defaults.
    beta_fast, beta_slow = (_number(f"{key}.{k}", raw.get(k, default)) for k, default in _YARN_BETAS.items())
    if not factor >= 1 or not beta_fast > beta_slow > 0:
        raise ConfigError(f"{key} must have factor >= 1 and beta_fast > beta_slow > 0, got {factor}, {beta_fast}, {beta_slow}")
    original = _integer(f"{key}.original_max_position_embeddings", raw.get("original_max_position_embeddings"), 1, 1 << 30)
    return RopeScaling(factor, original, beta_fast, beta_slow)
