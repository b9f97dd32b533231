"""The checkpoints of the GPU benchmark: of one shape or its compressed one, trained for some seconds.

    python -m benchmarks.serving.gpu_models DIRECTORY DATA SECONDS

Speed needs no good model, but a search through a randomly weighted one ends at once.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.atomic import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from models.checkpoint import Recommender
    from models.data import Dataset

FULL, PRUNED = "smollm2-135m-shape", "smollm2-135m-shape-5"
VOCABULARY = 4096
TITLES = 20
PROMPTS = 1600
BATCH_ROWS, ROW_TOKENS = 48, 256
LEARNING_RATE = 1e-3


def make(out: Path, data: str, seconds: float) -> None:
    """Write a trained checkpoint and, beside it, the prompts of its requests."""
    import torch
    from transformers import LlamaForCausalLM

    from benchmarks.serving.workload import make_workload
    from compress.plan import make_plan
    from models.checkpoint import Recommender, write_recommender
    from models.data import load_data
    from models.families import resized_config
    from models.presets import train_tokenizer
    from models.prompt import PromptConfig

    if out.exists():
        return
    dataset = load_data(data)
    catalog = dataset.catalog
    tokenizer = train_tokenizer(catalog.titles, catalog.popularity, VOCABULARY)
    config: Any = _smollm2_config(tokenizer)
    if out.name == PRUNED:
        plan = make_plan(config, "5%")
        config.vocab_size = -(-len(tokenizer) // 64) * 64
        config = resized_config(config, plan.final)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    prompt = PromptConfig(max_history=TITLES)
    recommender = Recommender(
        directory=out, config=config, tokenizer=tokenizer, catalog=catalog, prompt=prompt
    )
    training = {"data": data, "loss": _train(model, recommender, dataset, seconds)}
    write_recommender(
        out, model=model, tokenizer=tokenizer, catalog=catalog, prompt=prompt, training=training
    )
    write_json(out / "prompts.json", make_workload(recommender, data, PROMPTS).fresh)
    print(training)


def _smollm2_config(tokenizer: "PreTrainedTokenizerBase") -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(model: Any, recommender: "Recommender", dataset: "Dataset", seconds: float) -> float:
    """Train on windows of histories and the title that follows, as long as told; return the last loss."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompter, train = recommender.prompter, dataset.train
    users = [index for index in range(len(train)) if len(train[index]) > TITLES]
    generator = np.random.default_rng(0)
    ids = np.zeros((4096 if device == "cuda" else 64, ROW_TOKENS), np.int64)
    labels = np.full(ids.shape, -100)
    for row in range(len(ids)):
        history = train[users[generator.integers(len(users))]]
        start = generator.integers(len(history) - TITLES)
        window = history[start : start + TITLES + 1].tolist()
        tokens = [*prompter.encode(window[:-1]), *prompter.title_tokens[window[-1]]][-ROW_TOKENS:]
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    rows, wanted = torch.tensor(ids, device=device), torch.tensor(labels, device=device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    end, step, last = time.monotonic() + seconds, 0, float("nan")
    while time.monotonic() < end:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20)
        chosen = torch.randint(len(rows), (BATCH_ROWS if device == "cuda" else 4,), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=rows[chosen], labels=wanted[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = float(loss.detach())  # waits for the GPU: the clock counts what has run
        step += 1
    model.to("cpu").eval()
    print(f"{step} steps")
    return last


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
