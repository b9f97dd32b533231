"""Tiny random models of every family and calibration rows over a tiny catalogue."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.trie import Trie, build_trie

VOCABULARY = 96
END = 1


@pytest.fixture(scope="session")
def family_config() -> Callable:
    """Return a function from a family's name to a tiny config; keyword arguments override it."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    families = {
        "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
        "llama-untied": (LlamaConfig, {"tie_word_embeddings": False}),
        "llama-bias": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        "mistral": (MistralConfig, {"sliding_window": None}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    }

    def config(family: str, **overrides: object) -> object:
        kind, values = families[family]
        values = {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 192,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": END,
            "pad_token_id": None,
        } | values
        if family != "qwen2":
            values["head_dim"] = 32
        return kind(**values | overrides)

    return config


@pytest.fixture(scope="session")
def random_model() -> Callable:
    """Return a function from a config to a model with random weights, norms and biases included."""
    from transformers import AutoModelForCausalLM

    def model(config: object, seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.1)
        return made.eval()

    return model


@pytest.fixture(scope="session")
def catalogue_trie() -> Trie:
    """Return the trie of 60 random titles of one to five tokens."""
    generator = np.random.default_rng(0)
    titles = {(*generator.integers(2, VOCABULARY, generator.integers(1, 6)).tolist(), END) for _ in range(60)}
    listed = [list(title) for title in sorted(titles)]
    return build_trie(listed, np.ones(len(listed), np.int64), [str(n) for n in range(len(listed))])


@pytest.fixture(scope="session")
def calibration_rows(catalogue_trie: Trie) -> list:
    """Return two batches of packed titles, the second with padded rows."""
    from compress.calibrate import CalibrationBatch

    generator = np.random.default_rng(1)
    batches = []
    for padded in (False, True):
        rows, nodes = [], []
        for _ in range(6):
            tokens, at = [0], []
            while len(tokens) < 40:
                leaf = int(generator.integers(catalogue_trie.num_leaves))
                title = catalogue_trie.tokens_of_leaf(leaf).tolist()
                branches = dict(
                    zip(
                        (catalogue_trie.depth[n] for n in catalogue_trie.branches_of_leaf(leaf)[0]),
                        catalogue_trie.branches_of_leaf(leaf)[0],
                        strict=True,
                    )
                )
                at += [branches.get(depth, -1) for depth in range(len(title))]
                tokens += title
            rows.append(tokens[:40])
            nodes.append([*at, -1][:40])
        input_ids, node_ids = torch.tensor(rows), torch.tensor(nodes)
        mask = torch.ones_like(input_ids)
        if padded:
            mask[::2, 30:] = 0
            node_ids[mask == 0] = -1
        title_mask = (mask != 0) & (torch.arange(40) >= 8)
        batches.append(CalibrationBatch(input_ids, mask if padded else None, node_ids, title_mask))
    return batches
