"""The pruned model against the full one: CPU time a request, weights, memory above an empty engine's.

    python -m benchmarks.serving.pruned [--rounds 3]

SmolLM2-135M as it is published, and a model of the demonstration's shape, with the catalogue of ML-100K,
against the shapes that `compress --target 5% --vocab catalog` gives them, with random weights. Speed depends
on the shape and on the tokens run: a random model opens fewer nodes than a trained one, so both numbers stand
beside the time. int8 versions run too where the CPU has their products. Keeps its rows in
`benchmarks/serving/pruned.json`, beside those of other machines.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.checkpoints import RUNS, quantised
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware
from benchmarks.serving.race import Case, Entry, rows, run_race
from benchmarks.serving.workload import make_workload
from loadtest.machine import describe_versions
from models.checkpoint import Recommender, read_recommender, write_recommender
from models.data import load_data
from models.errors import LeanRecError
from models.families import Shape, Traits, count_parameters, resized_config
from models.precision import check_int8_products, served_dtype
from models.prompt import PromptConfig
from serve.plan import weight_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DATA = "ml-100k"
EXPANSIONS = 28
"""Most nodes a search opens: what one of a trained model with MovieLens titles opens on average."""
CASES = {Case(1): 16, Case(16): 64}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.pruned")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    smollm2 = _smollm2(RUNS / "smollm2-135m")
    demo = _demo(RUNS / "demo")
    pruned = [_pruned(full, RUNS / f"{full.directory.name}-pruned-5") for full in (smollm2, demo)]
    empty = _empty(pruned[0], RUNS / "empty")
    unquantised = (smollm2, pruned[0], empty) if _has_int8() else ()
    int8 = [read_recommender(quantised(full.directory)) for full in unquantised]
    recommenders = [smollm2, demo, *pruned, empty, *int8]
    entries = [_entry(recommender, options.rounds) for recommender in recommenders]
    race = run_race(entries, options.rounds, RUNS / "logs")
    facts = {
        "data": DATA,
        "hardware": hardware(),
        "precision": served_dtype("cpu"),
        "versions": describe_versions(),
    }
    found = rows(race, entries, reference=smollm2.directory.name, facts=facts)
    counts = {
        r.directory.name: count_parameters(Shape.of(r.config), Traits.of(r.config)) for r in recommenders
    }
    for row in found:
        row["weights_bytes"] = weight_bytes(RUNS / row["model"], served_dtype("cpu"))
        answers = race.measured[row["contender"], Case(row["clients"])].answers.values()
        row["expansions"] = sum(answer["expansions"] for answer in answers) / len(answers)
        row["non_embedding"] = counts[row["model"]].non_embedding
    keep_rows(Path("benchmarks/serving/pruned.json"), found, ("model", "hardware"))
    print(json.dumps(found, indent=1))


def _has_int8() -> bool:
    try:
        check_int8_products("int8 models")
    except LeanRecError as error:
        print(error, file=sys.stderr)
        return False
    return True


def _entry(recommender: Recommender, rounds: int) -> Entry:
    workload = make_workload(recommender, DATA, (rounds + 1) * len(CASES) * max(CASES.values()))
    name = recommender.directory.name
    return Entry(name, "worker", recommender.directory, CASES, workload, recommender.config, EXPANSIONS)


def _smollm2(out: Path) -> Recommender:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.gguf_smollm2 import smollm2_checkpoint

    if not out.exists():
        source = smollm2_checkpoint(out.with_name(out.name + ".base"))
        _write(out, AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    return read_recommender(out)


def _demo(out: Path) -> Recommender:
    from models.presets import PRESETS, new_model, train_tokenizer

    if not out.exists():
        catalog = load_data(DATA).catalog
        tokenizer = train_tokenizer(catalog.titles, catalog.popularity, PRESETS["demo"].vocabulary)
        _write(out, new_model(PRESETS["demo"], tokenizer, max_positions=4096), tokenizer)
    return read_recommender(out)


def _pruned(full: Recommender, out: Path) -> Recommender:
    from compress.plan import make_plan
    from models.vocabulary import trimmed_recommender

    if not out.exists():
        trimmed = trimmed_recommender(full, load_data(DATA).train).recommender
        config = resized_config(trimmed.config, make_plan(full.config, "5%", int8=True).stages[-1])
        _write(out, _random(config), trimmed.tokenizer)
    return read_recommender(out)


def _empty(pruned: Recommender, out: Path) -> Recommender:
    if not out.exists():
        shape = Shape(
            num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64
        )
        _write(out, _random(resized_config(pruned.config, shape)), pruned.tokenizer)
    return read_recommender(out)


def _random(config: "PreTrainedConfig") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _write(out: Path, model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    write_recommender(
        out,
        model=model,
        tokenizer=tokenizer,
        catalog=load_data(DATA).catalog,
        prompt=PromptConfig(max_history=20),
        training={"data": DATA},
    )


if __name__ == "__main__":
    main()
