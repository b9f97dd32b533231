"""Made-up reports of every kind that `loadtest` writes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from loadtest.capacity import Capacity, Step
from loadtest.load import Load
from loadtest.served_quality import ServedQuality, TestUsers
from loadtest.session import Session
from loadtest.slo import RateSearch, parse_objective
from tests.browser.hostile import HOSTILE
from tests.loadtest.made_up import QUALITY, make_report, make_run, make_session

Report = dict[str, Any]


def served_quality() -> ServedQuality:
    """Eighty users, most of whom both deployments answer alike; one title is hostile."""
    names = ["Star Wars (1977)", "Fargo (1996)", "Godfather, The (1972)", "Toy Story (1995)", HOSTILE]
    titles = {f"i{n}": names[n] if n < len(names) else f"Film {n} (19{60 + n % 40})" for n in range(40)}
    rng = np.random.default_rng(0)
    full = [rng.permutation(40)[:10].tolist() for _ in range(80)]
    pruned = [items[:7] + rng.permutation(40)[:10].tolist() for items in full]
    pruned = [list(dict.fromkeys(items))[:10] for items in pruned]
    lists = {"full": full, "pruned": pruned}
    return ServedQuality(
        users=TestUsers(
            user_ids=[f"u{n}" for n in range(80)],
            histories=[[f"i{m % 40}" for m in range(n, n + 5)] for n in range(80)],
            targets=[f"i{n % 40}" for n in range(80)],
            titles=titles,
        ),
        lists={name: [[f"i{n}" for n in items] for items in found] for name, found in lists.items()},
    )


def with_capacity(session: Session) -> Session:
    """Give a session the steps of a search for the highest rate."""
    capacity = Capacity(objective=parse_objective("p99=200ms"))
    rng = np.random.default_rng(1)
    for name, mean, found in (("full", 40.0, (40.0, 60.0)), ("pruned", 10.0, (160.0, 240.0))):
        capacity.searches[name] = RateSearch(20.0, met=found[0], missed=found[1])
        runs = [make_run(rng, name, Load(rate=rate), mean, 90) for rate in found]
        capacity.steps[name] = [
            Step(run=run, share_in_time=share, met=share > 0.99, problem=None)
            for run, share in zip(runs, (0.997, 0.91), strict=True)
        ]
    session.capacity = capacity
    return session


def by_url(report: Report) -> Report:
    """Return the report as it is where the deployments run elsewhere."""
    for side in report["deployments"].values():
        side["memory"] = dict.fromkeys(side["memory"]) | {"why_null": "attached by URL"}
        side["startup_seconds"] = None
    for level in report["levels"]:
        for name in ("full", "pruned"):
            level[name]["cpu_seconds_per_request"] = None
    report["speedup"]["memory"] = None
    return report


def partial() -> Report:
    """Return the report of a run in which a deployment died."""
    session = make_session(users=(1, 4))
    del session.runs[-3:]
    return make_report(session, incomplete=f"the full deployment ended with exit code 9; {HOSTILE}")


_KINDS: dict[str, Callable[[], Report]] = {
    "whole": lambda: make_report(make_session(served=served_quality()), quality=QUALITY),
    "capacity": lambda: make_report(
        with_capacity(make_session(rates=(5.0, 20.0, 40.0), served=served_quality()))
    ),
    "url": lambda: by_url(make_report(make_session())),
    "alike": lambda: make_report(make_session(users=(1,), slow=10.0)),
    "many-loads": lambda: make_report(make_session(users=(1, 2, 3, 4, 8, 64, 128))),
    "partial": partial,
    "nothing": lambda: make_report(make_session(pairs=0), incomplete="stopped"),
    "hostile": lambda: make_report(make_session(users=(1,)), command=f"loadtest --out '{HOSTILE}'"),
}
LOAD_TESTS = {kind: cache(make) for kind, make in _KINDS.items()}
"""Made when first asked for, and kept: they hold intervals from many draws."""
