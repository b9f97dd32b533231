"""What compiled decoder layers save: forward and backward of a model's body, with and without, in one run.

    python -m benchmarks.compiled [--base base]

`smollm2-135m` has that model's shape, `smollm2-135m-5` that of its 5 %; all weights are random.

Rows are packed as in training; head, loss and optimiser, the same for both, are left out. The two take turns
step by step, so that both meet the same machine. Prints JSON: medians, seconds a step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from models.compiled import LONG_CPU_RUN, compile_layers
from models.data import load_data
from models.finetune import SMOLLM2
from models.precision import fast_products
from models.presets import PRESETS, Preset, new_model, train_tokenizer
from models.sources import BUILT_IN
from models.trainer import final_hidden

ROWS, ROW_TOKENS, WINDOW_TOKENS = 8, 256, 128
TURNS = 20
SHAPES = {
    **PRESETS,
    SMOLLM2: Preset(
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocabulary=8192,
        max_history=20,
    ),
    f"{SMOLLM2}-5": Preset(
        hidden_size=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=600,
        vocabulary=4928,
        max_history=20,
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled")
    parser.add_argument("--base", choices=list(SHAPES), default="base")
    new, rows = models_and_rows(parser.parse_args().base, ROWS)
    models = {name: new() for name in ("as written", "compiled")}
    begun = time.monotonic()
    compiled = models["compiled"]
    if not compile_layers(compiled, steps=LONG_CPU_RUN, step_rows=ROWS, row_tokens=ROW_TOKENS, device="cpu"):
        raise SystemExit("compiled: no C++ compiler here")
    timed_step(compiled, rows)
    compiling = time.monotonic() - begun
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS + 2):
        for name, model in models.items():
            taken = timed_step(model, rows)
            if turn >= 2:
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    saved = medians["as written"] - medians["compiled"]
    numbers = ROWS * ROW_TOKENS * compiled.config.num_hidden_layers * compiled.config.hidden_size
    result = {
        "seconds_a_step": medians,
        "saved": saved / medians["as written"],
        "seconds_saved_a_billion_numbers": saved * 1e9 / numbers,
        "compiling_seconds": compiling,
    }
    print(json.dumps(result))


def models_and_rows(base: str, count: int) -> tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor]]:
    """Return what makes a model of a shape, and packed rows of random tokens for it, `[rows, seq]`."""
    catalog = load_data(BUILT_IN).catalog
    tokenizer = train_tokenizer(catalog.titles, catalog.popularity, SHAPES[base].vocabulary)
    torch.manual_seed(0)
    rows = {
        "input_ids": torch.randint(len(tokenizer), (count, ROW_TOKENS)),
        "position_ids": torch.arange(WINDOW_TOKENS).repeat(count, ROW_TOKENS // WINDOW_TOKENS),
    }
    return partial(new_model, SHAPES[base], tokenizer, max_positions=ROW_TOKENS), rows


def timed_step(model: PreTrainedModel, rows: dict[str, torch.Tensor]) -> float:
    """Return the seconds of one step."""
    begun = time.perf_counter()
    with fast_products("cpu"):
        final_hidden(model, rows).square().mean().backward()
    model.zero_grad()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
