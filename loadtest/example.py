"""A report with made-up figures and the shape of a run that has not begun."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loadtest import results
from loadtest.blocks import BlockPlan, BlockRun
from loadtest.capacity import Capacity
from loadtest.compare import Block
from loadtest.deployment import Deployment
from loadtest.empty import EmptyEngine
from loadtest.load import Load
from loadtest.memory import Sample
from loadtest.percentiles import MIN_REQUESTS_FOR_P99
from loadtest.report import SIDES
from loadtest.served_quality import ServedQuality, TestUsers
from loadtest.session import Agreement, Plan, Session
from loadtest.slo import RateSearch

_USERS = TestUsers(user_ids=["u"], histories=[["a"]], targets=["a"], titles={"a": "A"})


def example_report(
    plan: Plan,
    *,
    settings: Mapping[str, Any],
    quality: Mapping[str, Any] | None,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return a report that has every figure which a run of `plan` can have."""
    session = Session(plan=plan)
    session.agreement = Agreement(same_top1=np.ones(1), overlap=np.ones(1))
    for half in session.noise:
        half += [_run("full", plan.loads[-1], number) for number in range(plan.num_pairs)]
    for load in plan.loads:
        session.runs += [_run(name, load, number) for number in range(plan.num_pairs) for name in SIDES]
    if plan.objective:
        session.capacity = Capacity(objective=plan.objective)
        for name in SIDES:
            session.capacity.searches[name], session.capacity.steps[name] = RateSearch(1.0, met=1.0), []
    session.quality = ServedQuality(users=_USERS, lists={name: [["a"]] for name in SIDES})
    model = {"weights_bytes": 1, "kv_cache_bytes": 1}
    deployments = {name: Deployment(name=name, target="", url="", model=model) for name in SIDES}
    return results.build(
        session,
        deployments,
        {},
        empty=EmptyEngine(sample=Sample(1, 1, 1), weights_bytes=1, above_bytes=dict.fromkeys(SIDES, 1)),
        settings=settings,
        quality=quality,
        machine=machine,
        versions=versions,
    )


def _run(name: str, load: Load, number: int) -> BlockRun:
    latencies = np.ones(MIN_REQUESTS_FOR_P99)
    block = Block(latencies_ms=latencies, completed=1, seconds=1.0, sent=len(latencies))
    return BlockRun(
        deployment=name,
        plan=BlockPlan(number=number, load=load, warmup_s=0.0, window_s=1.0),
        started_at=0.0,
        block=block,
        problems={},
        cpu_seconds_per_request=1.0,
        lag_ms=np.zeros(1) if load.rate else np.zeros(0),
    )
