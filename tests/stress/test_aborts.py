"""Ten thousand clients that leave before they are answered: nothing of them is left on a vLLM engine."""

import asyncio
import json
import random
import socket
import time

import pytest

from models.checkpoint import Recommender
from models.kv_blocks import BlockPool
from models.vllm_engine import WorkerEngine
from serve.app import create_app
from serve.loading import load_in_vllm
from serve.service import Service
from tests.serve.http import client_of, running, wait_until

pytestmark = [pytest.mark.stress, pytest.mark.slow, pytest.mark.vllm]

ABORTS, TOGETHER, LONGEST_STAY_S = 10_000, 16, 0.02


def test_ten_thousand_aborted_requests(recommender: Recommender) -> None:
    arguments = ["--dtype", "float32", "--kv-cache-memory-bytes", "64M"]
    service = Service(lambda: load_in_vllm(recommender.directory, arguments))
    chance = random.Random(0)
    with running(create_app(service)) as url, client_of(url) as http:
        for _ in range(10):
            try:
                wait_until(lambda: not service.is_loading)
                break
            except AssertionError:
                continue
        assert service.state == "ready", service.failure
        sent = 0
        while _aborted(service) < ABORTS:
            assert sent < 10 * ABORTS, f"only {_aborted(service)} of {sent} left before their answer"
            leavers = []
            for n in range(sent, sent + TOGETHER):
                body = json.dumps({"history": [f"i{n % 80}", f"i{n // 80 % 80}"]}).encode()
                leaver = socket.create_connection(("127.0.0.1", http.base_url.port or 0))
                leaver.sendall(
                    b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n" % len(body) + body
                )
                leavers.append(leaver)
            sent += TOGETHER
            for leaver in leavers:  # some while they wait, some in a batch, some too late
                time.sleep(chance.random() * LONGEST_STAY_S / TOGETHER)
                leaver.close()
        batcher = service._batcher
        assert batcher is not None
        wait_until(lambda: not batcher._queue and not batcher._running)
        assert http.post("/recommend", json={"history": ["i1"]}).status_code == 200
        engine = service._loaded.engine if service._loaded else None
        assert isinstance(engine, WorkerEngine)
        pool = engine.llm.collective_rpc(lambda worker: worker._trie_pool)[0]
        assert isinstance(pool, BlockPool)
        assert not pool._held
        assert pool.num_available == pool.num_blocks - 1  # all but the one that is never handed out
        loop = service._tasks[0].get_loop()
        asyncio.run_coroutine_threadsafe(_few_tasks(), loop).result()
        print(json.dumps({"sent": sent, "aborted": _aborted(service)}))


async def _few_tasks() -> None:
    """Check that no task of a request is left."""
    tasks = [task.get_coro() for task in asyncio.all_tasks()]
    assert len(tasks) < 10, tasks


def _aborted(service: Service) -> float:
    counts = service.metrics.requests._metrics
    return sum(count._value.get() for (_, status), count in counts.items() if status == "499")
