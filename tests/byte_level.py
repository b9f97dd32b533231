"""Byte-level BPE tokenizers as the families have them, which know far more than a tiny catalogue."""

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.checkpoint import Recommender, read_recommender, write_recommender
from models.data import Dataset, load_data
from models.prompt import PromptConfig
from models.word_tokens import PATTERNS
from tests.tiny import tiny_model, write_tiny_data

STYLES = ("smollm2", "llama3", "qwen2")
PATTERN_OF = {"llama3": PATTERNS["Llama 3"], "qwen2": PATTERNS["Qwen 2"]}


def corpus() -> list[str]:
    rng = np.random.default_rng(5)
    syllables = "ka ro mi ten sho é ü str ing 日 本 ж ar 🎬 lo 9".split()  # noqa: SIM905
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(800)]
    words += "The user watched Next Red Blue Green Dark Silent Golden Last Lost River Night".split()  # noqa: SIM905
    plain = [" ".join(rng.choice(words, 12)) + "\n" for _ in range(1500)]
    runs = ["  ", "   ", "\t \t", "\u3000 ", " \x85"]  # tokens of their own, as real vocabularies have them
    return plain + ["ka" + run + run + "ro\n" for run in runs for _ in range(200)]


@cache
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer as a family's, of some 1,500 tokens."""
    made = Tokenizer(BPE(ignore_merges=style == "llama3"))
    made.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if style == "smollm2":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN_OF[style]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if style == "qwen2":
        made.normalizer = normalizers.NFC()
    made.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=specials if style == "smollm2" else [],  # the others' come after their own tokens
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if style == "llama3":
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|im_start|> $A",
                    pair="<|im_start|> $A $B",
                    special_tokens=[("<|im_start|>", made.token_to_id("<|im_start|>"))],
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=None if style == "qwen2" else "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def make_full(
    directory: Path, style: str = "smollm2", family: str = "llama", template: str | None = None
) -> tuple[Recommender, Dataset]:
    """Return a tiny recommender on disk whose tokenizer knows far more than its catalogue."""
    dataset = load_data(str(write_tiny_data(directory.parent / f"{directory.name}-data", users=30)))
    words = tokenizer(style)
    model = tiny_model(family, len(words), num_layers=2)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id = words.bos_token_id, words.pad_token_id
        config.eos_token_id = [words.eos_token_id, words.pad_token_id]
    write_recommender(
        directory,
        model=model,
        tokenizer=words,
        catalog=dataset.catalog,
        prompt=PromptConfig(max_history=8, **({"template": template} if template else {})),
        training={"data": str(directory.parent / f"{directory.name}-data"), "base": "random"},
    )
    return read_recommender(directory), dataset
