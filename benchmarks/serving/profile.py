"""Where the service's time goes: samples of its threads' stacks under 16 clients.

    python -m benchmarks.serving.profile [--model DIR --data D] [--seconds 30]

The service runs in this process, the clients in another. Writes this machine's row of
`benchmarks/serving/profile.json`: shares of the samples in which a thread did work, by what it worked on.
"""

import argparse
import collections
import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.serving.checkpoints import trained_recommender
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware, one_thread

INTERVAL = 0.004
PORT = 8765
KINDS = (
    ("model", ("models/vllm_fused.py", "models/vllm_forward.py", "/vllm/")),
    ("head over children", ("models/head.py",)),
    (
        "trie and search",
        ("models/search.py", "models/vllm_search.py", "models/trie.py", "models/kv_blocks.py"),
    ),
    ("prompt", ("models/prompt.py", "models/title_tokens.py", "/tokenizers/")),
    (
        "HTTP and JSON",
        ("/uvicorn/", "/fastapi/", "/starlette/", "/pydantic/", "/uvloop/", "/json/", "serve/app.py"),
    ),
    ("service", ("serve/",)),
)
"""The innermost frame in one of these files tells what a thread works on."""
WAITING = ("wait", "select", "get", "run_forever", "acquire", "_worker", "run", "sleep")


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.profile")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    one_thread()
    directory = options.model or trained_recommender("ml-100k", "ml-100k")
    found = profile(directory, options.data, options.seconds)
    keep_rows(Path("benchmarks/serving/profile.json"), [found], ("model", "hardware"))
    print(json.dumps(found, indent=2))


def profile(directory: Path, data: str, seconds: float) -> dict[str, Any]:
    """Return the shares of each kind of work, and the functions most often found at work."""
    from serve import cli

    clients = multiprocessing.get_context("spawn").Process(
        target=_clients, args=(directory, data), daemon=True
    )
    samples: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    over = threading.Event()
    sampler = threading.Thread(target=_sample, args=(samples, places, over), daemon=True)

    def watch() -> None:
        clients.start()
        while not _ready():
            time.sleep(0.1)
        time.sleep(3)  # the clients' first requests
        sampler.start()
        time.sleep(seconds)
        over.set()
        sampler.join()
        os.kill(os.getpid(), 15)

    threading.Thread(target=watch, daemon=True).start()
    cli.main(["--model", str(directory), "--port", str(PORT)])
    clients.kill()
    total = sum(samples.values())
    return {
        "model": directory.name,
        "hardware": hardware(),
        "samples": total,
        "shares": {kind: count / total for kind, count in samples.most_common()},
        "functions": {place: count / total for place, count in places.most_common(25)},
    }


def _sample(
    samples: "collections.Counter[str]", places: "collections.Counter[str]", over: threading.Event
) -> None:
    own = threading.get_ident()
    while not over.wait(INTERVAL):
        for thread, frame in sys._current_frames().items():
            if thread != own and (found := _work(frame)) is not None:
                samples[found[0]] += 1
                places[found[1]] += 1


def _work(innermost: FrameType) -> tuple[str, str] | None:
    """Return what a thread works on and the function it is in; None if it waits or is not the service's."""
    name = innermost.f_code.co_name
    file = innermost.f_code.co_filename
    if name in WAITING and not any(part in file for part in ("models/", "serve/", "/vllm/", "/torch/")):
        return None
    frame: FrameType | None = innermost
    while frame is not None:
        for kind, parts in KINDS:
            if any(part in frame.f_code.co_filename for part in parts):
                return kind, f"{Path(file).name}:{name}"
        frame = frame.f_back
    return None


def _ready() -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _clients(directory: Path, data: str) -> None:
    import asyncio

    from benchmarks.serving.service import closed_loop
    from benchmarks.serving.workload import make_workload
    from models.checkpoint import read_recommender

    recommender = read_recommender(directory)
    workload = make_workload(recommender, data, 8000)
    ids = [[recommender.catalog.item_ids[r] for r in rows] for rows in workload.histories]
    while not _ready():
        time.sleep(0.1)
    asyncio.run(closed_loop(f"http://127.0.0.1:{PORT}", ids))


if __name__ == "__main__":
    main()
