"""Small real data and small random recommenders for the tests."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.checkpoint import read_recommender, write_recommender
from models.data import Dataset, load_data
from models.per_layer import LayerShape, PerLayerShape
from models.per_layer_model import LeanRecForCausalLM, per_layer_config
from models.presets import train_tokenizer
from models.prompt import PromptConfig

FAMILIES = ("llama", "llama-untied", "llama-bias", "mistral", "qwen2", "qwen3")
_WORDS = (
    "red",
    "blue",
    "green",
    "dark",
    "silent",
    "golden",
    "last",
    "lost",
    "river",
    "night",
    "city",
    "star",
)


def write_tiny_data(folder: Path, *, users: int = 60, items: int = 80, seed: int = 0) -> Path:
    """Write interactions.parquet and items.parquet with something to learn: items follow a ring."""
    rng = np.random.default_rng(seed)
    titles = [
        " ".join(rng.choice(_WORDS, size=rng.integers(1, 4)).tolist()).title() + f" ({1960 + i % 50})"
        for i in range(items)
    ]
    titles[1] = titles[0]  # two items share a title
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"item_id": [f"i{i}" for i in range(items)], "title": titles}), folder / "items.parquet"
    )
    rows: dict[str, list[object]] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(users):
        at = int(rng.integers(items))
        for step in range(int(rng.integers(5, 25))):
            at = (at + int(rng.integers(1, 4))) % items
            rows["user_id"].append(f"u{user}")
            rows["item_id"].append(f"i{at}")
            rows["timestamp"].append(1_000_000_000 + 40_000 * step)
    pq.write_table(pa.table(rows), folder / "interactions.parquet")
    return folder


def tiny_model(
    family: str,
    vocabulary: int,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 256,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a random model of a family, fp32; its weights are large enough that outputs differ clearly."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": -(-vocabulary // 64) * 64,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, head_dim=head_dim, sliding_window=None))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=head_dim, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                **shape,
                head_dim=head_dim,
                tie_word_embeddings=family != "llama-untied",
                attention_bias=family == "llama-bias",
            )
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


PER_LAYER = PerLayerShape(
    128,
    32,
    (
        LayerShape(0, 0, 64),
        LayerShape(4, 2, 0),
        LayerShape(3, 3, 96),
        LayerShape(2, 1, 128),
        LayerShape(0, 0, 32),
    ),
)
"""Every kind of layer, the first and the last without attention."""


def make_per_layer_recommender(directory: Path, family: str, *, data: Path) -> None:
    """Write a random recommender whose layers differ, with a family's biases and norms, to `directory`."""
    folder = directory.with_name(f"{directory.name}-uniform")
    make_tiny_recommender(folder, family, data=data, max_history=12)
    uniform = read_recommender(folder)
    torch.manual_seed(0)
    model = LeanRecForCausalLM(per_layer_config(uniform.config, PER_LAYER))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    write_recommender(
        directory,
        model=model.eval(),
        tokenizer=uniform.tokenizer,
        catalog=uniform.catalog,
        prompt=uniform.prompt,
        training=uniform.training,
    )


def make_tiny_recommender(
    directory: Path, family: str = "llama", *, data: Path | None = None, max_history: int = 8, **shape: int
) -> Dataset:
    """Write a random recommender of a family to `directory`, and return the data it was made for."""
    folder = data or write_tiny_data(directory.parent / "tiny-data")
    dataset = load_data(str(folder))
    tokenizer = train_tokenizer(dataset.catalog.titles, dataset.catalog.popularity, 400)
    write_recommender(
        directory,
        model=tiny_model(family, len(tokenizer), **shape),
        tokenizer=tokenizer,
        catalog=dataset.catalog,
        prompt=PromptConfig(max_history=max_history),
        training={"data": str(folder), "split": "leave-one-out", "seed": 0, "base": "random"},
    )
    return dataset
