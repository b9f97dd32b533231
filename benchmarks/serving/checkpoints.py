"""The recommenders the serving benchmark asks: of a shape that compression makes, trained enough to search.

Randomly weighted models are useless here: their searches end at once or never.

    python -m benchmarks.serving.checkpoints DATA NAME [--epochs 1]
"""

import argparse
import shutil
from pathlib import Path

from models.checkpoint import read_recommender
from models.data import load_data
from models.finetune import FinetuneConfig, finetune
from models.presets import END, PAD, START

RUNS = Path("runs/serving")
VOCABULARY = 3072
"""Near the 3,119 tokens that remain of a large vocabulary when it is trimmed to MovieLens-100K."""
MAX_HISTORY = 20
EPOCHS = 1
LEARNING_RATE = 1.5e-3
BATCH_TOKENS = 2048
VALIDATION_USERS = 100
"""Any state of the model will do."""


def trained_recommender(data: str, name: str, epochs: int = EPOCHS) -> Path:
    """Return a recommender of 5 % of Qwen2-0.5B's shape trained on a data set; it is made once.

    Args:
        data: What `--data` takes.
        name: Its folder under `runs/serving`.
        epochs: More where a data set is so small that one leaves a model with the same answer for all.
    """
    out = RUNS / name
    base = RUNS / f"{name}.base"
    if not out.exists() and not base.exists():
        _untrained(data, base)
    config = FinetuneConfig(
        base=str(base),
        data=data,
        out=out,
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        batch_tokens=BATCH_TOKENS,
        validation_users=VALIDATION_USERS,
        max_history=MAX_HISTORY,
        device="cpu",
    )
    return finetune(config)


def _untrained(data: str, out: Path) -> None:
    """Write a random model of 8 layers, hidden 448, 7 heads, 1 KV head, MLP 1280, and its tokenizer.

    The tokenizer splits at words, as those of language models do: a title is some ten tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((title + "\n" for title in load_data(data).catalog.titles), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(fast) // 64) * 64,
            hidden_size=448,
            num_hidden_layers=8,
            num_attention_heads=7,
            num_key_value_heads=1,
            head_dim=64,
            intermediate_size=1280,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    temporary = out.with_name(out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    fast.save_pretrained(temporary)
    temporary.rename(out)


def quantised(directory: Path) -> Path:
    """Return the int8 version of a recommender, `<directory>-int8`; it is made once."""
    from compress.quantize import quantize_recommender

    out = directory.with_name(directory.name + "-int8")
    if not out.exists():
        quantize_recommender(read_recommender(directory), out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.checkpoints")
    parser.add_argument("data")
    parser.add_argument("name")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    print(trained_recommender(**vars(parser.parse_args())))
