"""Material that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from dsv4lab.config import ModelConfig
from dsv4lab.model.checkpoint import random_items, write_checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "keep the kernels that tests compile in this folder, for the next run; by default each run compiles them anew"
    parser.addoption("--kernels", metavar="FOLDER", type=Path, help=text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def figure_settings_stay_put() -> Iterator[None]:
    """What a test does to matplotlib's settings ends with it: `lab.setup` applies the house style for good."""
    with matplotlib.rc_context():
        yield


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """All layer kinds, both routers and MTP at nano's widths, with one token a byte and three control tokens."""
    return replace(ModelConfig.nano(), vocab_size=259, bos_token_id=256, eos_token_ids=(257,))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """A random checkpoint of `tiny_config` in the official layout, with a byte-level tokenizer. Do not write into it."""
    root = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(root, tiny_config, random_items(tiny_config, layout="official", seed=11), layout="official")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"])  # noqa: RUF001 - the model's own
    (root / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return root
