"""Models trained from scratch on a catalogue: their tokenizer and their shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

START, END, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A Llama shape with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    max_history: int
    """Titles a prompt holds: people on MovieLens rate a hundred films and more in a row."""
    batch_tokens: int = 2048
    """of a training step: the larger model learns much less from small ones"""
    learning_rate: float = 4e-3


PRESETS = {
    "demo": Preset(
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=412,
        vocabulary=4096,
        max_history=50,
    ),
    "base": Preset(
        hidden_size=384,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=1024,
        vocabulary=8192,
        max_history=50,
        batch_tokens=16384,
        learning_rate=2e-3,
    ),
}


def train_tokenizer(
    titles: Sequence[str], popularity: np.ndarray, vocabulary: int
) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer learnt on the titles, each counted by the root of its popularity.

    Merges may cross words but not lines, so a frequent title is a few tokens and the title's end is its own.
    Any text encodes: all 256 bytes are in the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    repeats = np.sqrt(popularity).astype(np.int64) + 1
    tokenizer.train_from_iterator(
        (title + "\n" for title, times in zip(titles, repeats, strict=True) for _ in range(times)), trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD)


def new_model(preset: Preset, tokenizer: "PreTrainedTokenizerFast", max_positions: int) -> "LlamaForCausalLM":
    """Return a randomly initialised model of a preset's shape; seed torch before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = -(-len(tokenizer) // 64) * 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_kv_heads,
        head_dim=preset.head_dim,
        intermediate_size=preset.intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
