"""A run whose figures are known."""

import os

import numpy as np

from loadtest import results
from loadtest.blocks import BlockPlan, BlockRun
from loadtest.compare import Block
from loadtest.deployment import Deployment
from loadtest.load import Load
from loadtest.memory import MemoryWatch, Sample
from loadtest.session import Agreement, Plan, Session, pair_order

QUALITY = {
    "source": "runs/pruned-5/report.json",
    "metrics": {
        "full": {"hr@10": 0.16, "ndcg@10": 0.08, "ci95": {"hr@10": [0.14, 0.18], "ndcg@10": [0.07, 0.09]}},
        "pruned": {"hr@10": 0.15, "ndcg@10": 0.076, "ci95": {"hr@10": [0.13, 0.17], "ndcg@10": [0.07, 0.08]}},
    },
    "retained": {"hr@10": 0.9375, "ndcg@10": 0.95},
}


def make_run(rng, name, load, mean, number):
    size = 80 + 10 * int(load.size)
    latencies = mean * rng.lognormal(0, 0.25, size)
    seconds = latencies.sum() / 1000 / load.size if load.users else size / load.size
    block = Block(latencies_ms=latencies, completed=size, seconds=seconds, sent=size)
    return BlockRun(
        deployment=name,
        plan=BlockPlan(number=number, load=load, warmup_s=1, window_s=seconds),
        started_at=1.8e9 + number,
        block=block,
        problems={},
        cpu_seconds_per_request=mean / 1000,
        lag_ms=np.full(size, 0.5) if load.rate else np.zeros(0),
    )


def make_session(*, pairs=6, slow=40.0, fast=10.0, users=(1, 4, 16), rates=(), seed=3, served=None):
    """Each user of the full deployment waits `slow` ms on average, of the pruned one `fast` ms."""
    loads = [Load(rate=rate) for rate in rates] or [Load(users=number) for number in users]
    plan = Plan(loads=loads, seconds=float(max(pairs, 1)))
    rng = np.random.default_rng(seed)
    session = Session(plan=plan)
    session.quality = served
    session.agreement = Agreement(same_top1=np.array([1.0, 0.0] * 50), overlap=np.full(100, 0.7))
    number = 2
    for _ in range(pairs):
        for half in (0, 1):
            session.noise[half].append(make_run(rng, "full", loads[-1], slow * loads[-1].size ** 0.7, number))
            number += 1
    for load in loads:
        for pair in range(pairs):
            for name in pair_order(pair):
                mean = (slow if name == "full" else fast) * load.size**0.7
                session.runs.append(make_run(rng, name, load, mean, number))
            number += 1
    return session


def make_report(session, *, quality=None, incomplete=None, command="loadtest --full runs/ml-100k/full ..."):
    deployments, watches = {}, {}
    for name, weights, others in (("full", 64 << 20, 700 << 20), ("pruned", 8 << 20, 690 << 20)):
        model = {"weights_bytes": weights, "kv_cache_bytes": 128 << 20, "max_history": 20}
        deployments[name] = Deployment(
            name=name, target=f"runs/{name}", url="http://127.0.0.1:1", model=model, startup_seconds=12.5
        )
        watch = MemoryWatch(os.getpid())
        steady = weights + (128 << 20) + others
        watch.samples = [Sample(size, 2 * size) for size in (steady, steady + (200 << 20), steady)]
        watches[name] = watch
    settings = {
        "command": command,
        "data": "ml-100k",
        "data_digest": "1234",
        "max_history": 50,
        "histories": 943,
        "pairs": session.plan.num_pairs,
        "window_seconds": session.plan.window_s,
        "warmup_seconds": 1.0,
        "returning": 0.0,
        "price_per_hour": 0.36,
        "users": [load.users for load in session.plan.loads if load.users],
        "rates": [load.rate for load in session.plan.loads if load.rate],
        "seed": 0,
    }
    return results.build(
        session,
        deployments,
        watches,
        settings=settings,
        quality=quality,
        machine={"cpu": "Some <CPU> & more", "cores": 2},
        versions={"python": "3.11"},
        incomplete=incomplete,
    )
