"""What a catalogue of a million titles costs beside one of two thousand, with the same model.

    python -m benchmarks.serving.big_catalog [--model DIR]

Without a model, that of the race. Prints one JSON object a catalogue and keeps them beside those of other
models in `benchmarks/serving/big_catalog.json`: how long its index takes to build and to load, how long the
service takes to start with it and what memory it holds, and the latency of one request at equal numbers of
expansions. CPU seconds stand beside wall time: they bear a busy machine.
"""

import argparse
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.checkpoints import trained_recommender
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware, one_thread
from models.atomic import new_directory, write_json
from models.catalog import Catalog, make_catalog, write_catalog
from models.checkpoint import Recommender, read_recommender
from models.data import load_data
from models.errors import UsageError, run_command
from models.golden import FILE, write_golden
from models.index import INDEX, index_key, load_index, save_index
from models.search import SearchRequest, SearchSettings
from models.trie import build_trie
from serve.shelf import Shelf

RUNS = Path("runs/serving")
SMALL = 2000
KV_CACHE_BYTES = 128 * 2**20
BUDGETS = (8, 16, 32)
"""Expansions at which latencies are compared; below what a search needs to be certain in either catalogue"""


def recombined_catalog(items: int, seed: int = 0) -> Catalog:
    """Return MovieLens-100K's items and further ones with unique titles recombined from theirs.

    A new title is the beginning of one real title, the end of another and a year. Popularity is Zipf's.
    """
    real = load_data("ml-100k").catalog
    beginnings, ends = set(), set()
    for title in real.titles:
        words = re.sub(r" \(\d{4}\)$", "", title).split()
        for cut in range(1, len(words)):
            beginnings.add(" ".join(words[:cut]))
            ends.add(" ".join(words[cut:]))
    pools = [np.array(sorted(pool), object) for pool in (beginnings, ends, map(str, range(1922, 1999)))]
    rng = np.random.default_rng(seed)
    known, added = set(real.titles), dict[str, None]()
    while len(added) < items - len(real):
        drawn = zip(*(pool[rng.integers(len(pool), size=items)] for pool in pools), strict=True)
        added.update(dict.fromkeys(f"{beginning} {end} ({year})" for beginning, end, year in drawn))
        for title in known.intersection(added):
            del added[title]
    titles = list(added)[: items - len(real)]
    ids = [*real.item_ids, *(f"new-{number}" for number in range(len(titles)))]
    popularity = np.concatenate([real.popularity, np.minimum(rng.zipf(1.5, len(titles)), 1000)])
    return make_catalog(ids, [*real.titles, *titles], popularity, "recombined titles")


def with_catalog(model: Path, items: int) -> Path:
    """Return a copy of a recommender with a recombined catalogue; it is made once."""
    out = RUNS / f"{model.resolve().name}-{items}-items"
    if not out.exists():
        with new_directory(out) as directory:
            for path in model.iterdir():
                if path.name not in (FILE, INDEX) and path.is_file():
                    shutil.copy(path, directory)
            described = json.loads((model / "recommender.json").read_text())
            sha256 = write_catalog(directory / "catalog.parquet", recombined_catalog(items))
            described["catalog"] = {"file": "catalog.parquet", "sha256": sha256}
            write_json(directory / "recommender.json", described)
            write_golden(directory)
    return out


def build_row(directory: Path) -> dict[str, Any]:
    """Return what the index and the catalogue cost, wall and CPU seconds."""
    row: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        row[f"{name}_seconds"] = round(time.perf_counter() - wall, 3)
        row[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 3)
        return result

    recommender = read_recommender(directory)  # transformers is imported outside the times below
    recommender = timed("read", lambda: read_recommender(directory))
    catalog = recommender.catalog
    tokens = timed("tokenise", lambda: recommender.prompter.encode_titles(catalog.titles))
    trie = timed("trie", lambda: build_trie(tokens, catalog.popularity, catalog.item_ids))
    key = timed("key", lambda: index_key(directory, catalog.version, recommender.prompt))
    timed("save", lambda: save_index(directory / INDEX, key, trie))
    timed("load", lambda: load_index(directory / INDEX, key))
    timed("shelf", lambda: Shelf.of(recommender).fill())
    row["index_bytes"] = (directory / INDEX).stat().st_size
    row["title_tokens"] = len(trie.leaf_tokens)
    row["branching_nodes"] = trie.num_nodes
    row["root_children"] = len(trie.children(0)[0])
    return row


@contextmanager
def service(directory: Path) -> Iterator[tuple[int, str, float]]:
    """Yield process id, address and seconds until ready of `serve` in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve.cli", "--model", str(directory), "--port", str(port)]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)], stderr=subprocess.DEVNULL
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"serve ended with {process.returncode}")
            try:
                opener.open(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        yield process.pid, f"http://127.0.0.1:{port}", time.perf_counter() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def start_row(directory: Path) -> dict[str, float]:
    """Return what one start takes: seconds, CPU seconds and PSS when ready."""
    import psutil

    with service(directory) as (pid, _, seconds):
        process = psutil.Process(pid)
        used = process.cpu_times()
        return {
            "start_seconds": round(seconds, 2),
            "start_cpu_seconds": round(sum(used[:4]), 2),
            "pss_bytes": process.memory_full_info().pss,
        }


def latencies(recommenders: dict[int, Recommender], requests: int) -> dict[int, dict[str, Any]]:
    """Return, by catalogue, p50 and CPU milliseconds of one request at a time, at each budget and at none.

    One engine answers the same histories over both catalogues in turn, ten requests at a time.
    """
    from models.vllm_engine import open_engine

    rng = np.random.default_rng(0)
    small = recommenders[min(recommenders)]
    histories = [rng.choice(1682, 20, replace=False).tolist() for _ in range(requests)]
    prompts = [small.prompter.encode(history) for history in histories]
    arguments = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "max_model_len": 1024}
    rows: dict[int, dict[str, Any]] = {items: {} for items in recommenders}
    for budget in (*BUDGETS, SearchSettings().max_expansions):
        # Whole subtrees at once would be other numbers of nodes in the two.
        settings = SearchSettings(max_expansions=budget, subtree=0)
        engine = open_engine(small, settings=settings, arguments=arguments)
        seen: dict[int, list[tuple[float, ...]]] = {items: [] for items in recommenders}
        for start in range(0, requests, 10):
            for items, recommender in recommenders.items():
                begun = time.perf_counter()
                engine.use_trie(recommender.trie)
                rows[items]["engine_takes_trie_seconds"] = round(time.perf_counter() - begun, 3)
                engine.recommend([SearchRequest(prompt=prompts[0])])
                for prompt in prompts[start : start + 10]:
                    # Other first tokens: no prefix of an earlier request is found again.
                    fresh = [*rng.integers(5, small.config.vocab_size, 3).tolist(), *prompt]
                    wall, cpu = time.perf_counter(), time.process_time()
                    result = engine.recommend([SearchRequest(prompt=fresh)])[0]
                    took = time.perf_counter() - wall, time.process_time() - cpu
                    seen[items].append((*took, result.expansions, result.steps))
        engine.close()
        for items, measured in seen.items():
            wall_s, cpu_s, expansions, steps = np.array(measured).T
            rows[items][f"budget_{budget}"] = {
                "p50_ms": round(1e3 * float(np.median(wall_s)), 2),
                "p50_cpu_ms": round(1e3 * float(np.median(cpu_s)), 2),
                "mean_expansions": round(float(expansions.mean()), 1),
                "mean_steps": round(float(steps.mean()), 1),
            }
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON object a catalogue."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.big_catalog", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=3, help="starts of each service, in turn")
    parser.add_argument("--requests", type=int, default=60)
    options = parser.parse_args(argv)
    if options.items <= SMALL:
        raise UsageError(f"--items {options.items}: must be more than {SMALL}")
    one_thread()
    sizes = (SMALL, options.items)
    model = options.model or trained_recommender("ml-100k", "ml-100k")
    directories = {items: with_catalog(model, items) for items in sizes}
    rows = {
        items: {"model": model.name, "hardware": hardware(), "items": items} | build_row(directories[items])
        for items in sizes
    }
    starts: dict[int, list[dict[str, float]]] = {items: [] for items in sizes}
    for _ in range(options.starts):
        for items in sizes:
            starts[items].append(start_row(directories[items]))
    for items, found in starts.items():
        rows[items] |= {name: [one[name] for one in found] for name in found[0]}
    measured = latencies({items: read_recommender(directories[items]) for items in sizes}, options.requests)
    found = [rows[items] | measured[items] for items in sizes]
    keep_rows(Path("benchmarks/serving/big_catalog.json"), found, ("model", "hardware"))
    for row in found:
        print(json.dumps(row), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of this process: {peak / 2**20:.0f} MiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
