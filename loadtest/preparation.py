"""Everything that is read and checked before anything starts."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.address import is_url
from loadtest.arguments import Arguments
from loadtest.deployment import Deployment, attached
from loadtest.example import example_report
from loadtest.fail_if import check_paths
from loadtest.generator import Generator
from loadtest.inputs import (
    digest,
    make_test_users,
    make_workload,
    read_description,
    read_quality,
    trained_on,
)
from loadtest.load import Load
from loadtest.machine import describe_machine, describe_versions
from loadtest.request_log import read_log
from loadtest.runner import WARMUP_S
from loadtest.served_quality import TestUsers
from loadtest.session import Plan
from loadtest.workload import Workload
from models.data import load_data
from models.errors import LeanRecError, UsageError

MIN_REQUESTS_A_BLOCK = 10
OUTPUTS = ("report.json", "report.html", "report.md", "requests", "logs")
"""What a run writes, and what the next run into the same directory replaces."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a run begins with."""

    plan: Plan
    workload: Workload
    users: TestUsers | None
    """whom quality is measured on"""
    attached: Mapping[str, Deployment]
    """the deployments that run already"""
    known: Mapping[str, Any]
    """parts of the report: `settings`, `quality`, `machine`, `versions`"""
    out: Path
    generator: Generator


def prepare(arguments: Arguments) -> Preparation:
    """Return what a run begins with, and make its empty output directory.

    Raises:
        UsageError: an input that cannot be measured.
        LeanRecError: one that cannot be read, or a directory that cannot be written.
    """
    targets = arguments.targets
    generator = arguments.generator.check(targets)
    described = {name: read_description(name, Path(t)) for name, t in targets.items() if not is_url(t)}
    running = {name: attached(name, t) for name, t in targets.items() if is_url(t)}
    data = arguments.data or trained_on(described.values())
    max_histories = [
        *(entry["prompt"]["max_history"] for entry in described.values()),
        *(deployment.model["max_history"] for deployment in running.values()),
    ]
    plan = make_plan(arguments)
    dataset = load_data(data)
    workload = make_workload(
        dataset,
        max_history=min(max_histories),
        returning=arguments.returning,
        seed=arguments.seed,
        num_blocks=plan.num_blocks,
    )
    settings = _settings(arguments, data, plan, workload)
    if arguments.replay:
        log = read_log(arguments.replay)
        log.check(arguments.replay, log_header(settings))
        workload = log.replayed_by(workload)
        settings["returning"] = log.header.get("returning", 0.0)
    known: dict[str, Any] = {
        "settings": settings,
        "quality": read_quality(Path(arguments.pruned)),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    check_paths(arguments.fail_if, example_report(plan, **known))
    out = arguments.out or Path("runs", Path(data).name, "loadtest")
    if arguments.save_requests:
        _check_writable(f"--save-requests {arguments.save_requests}", arguments.save_requests.parent)
    _check_writable(f"--out {out}", out)
    _check_free(out)
    _empty(out)
    return Preparation(
        plan=plan,
        workload=workload,
        users=make_test_users(dataset, arguments.quality_users, arguments.seed, Path(arguments.pruned)),
        attached=running,
        known=known,
        out=out,
        generator=generator,
    )


def make_plan(arguments: Arguments) -> Plan:
    """Return what to measure.

    Raises:
        UsageError: a rate at which a block would hold next to nothing.
    """
    if not arguments.rates:
        loads = [Load(users=users) for users in arguments.users]
        return Plan(loads=loads, seconds=arguments.seconds, objective=arguments.objective)
    loads = [Load(rate=rate) for rate in arguments.rates]
    plan = Plan(loads=loads, seconds=arguments.seconds, objective=arguments.objective)
    expected = plan.loads[0].size * plan.window_s
    if expected < MIN_REQUESTS_A_BLOCK:
        raise UsageError(
            f"--rate {plan.loads[0].size:g} sends about {expected:.3g} requests in a block of "
            f"{plan.window_s:.3g} s, and {MIN_REQUESTS_A_BLOCK} are needed; raise --seconds or the rate"
        )
    return plan


def log_header(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a saved log says of the run it is of."""
    keys = ("users", "rates", "seconds", "data", "data_digest", "returning", "seed")
    return {key: settings[key] for key in keys}


def _settings(arguments: Arguments, data: str, plan: Plan, workload: Workload) -> dict[str, Any]:
    return {
        "command": arguments.command,
        "data": data,
        "data_digest": digest(workload),
        "histories": len(workload.histories),
        "max_history": workload.max_history,
        "users": [load.users for load in plan.loads if load.users],
        "rates": [load.rate for load in plan.loads if load.rate],
        "seconds": plan.seconds,
        "pairs": plan.num_pairs,
        "window_seconds": plan.window_s,
        "warmup_seconds": WARMUP_S,
        "returning": arguments.returning,
        "locust_workers": arguments.generator.workers,
        "replay": str(arguments.replay) if arguments.replay else None,
        "seed": arguments.seed,
        "objective": arguments.objective.text if arguments.objective else None,
        "price_per_hour": arguments.price_per_hour,
        "fail_if": [condition.text for condition in arguments.fail_if],
    }


def _check_writable(label: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LeanRecError(f"{label}: cannot be written ({error.strerror}); choose another") from error


def _check_free(out: Path) -> None:
    """Refuse to replace what no load test wrote: an earlier one left both of its folders."""
    taken = [name for name in OUTPUTS if (out / name).exists()]
    if not taken or (
        (out / "requests").is_dir() and (out / "logs").is_dir() and _is_ours(out / "report.json")
    ):
        return
    raise LeanRecError(
        f"--out {out}: holds {' and '.join(taken)} that no load test wrote, and would lose it; choose another"
    )


def _is_ours(report: Path) -> bool:
    """Whether a report is a load test's; one that was not written yet counts as that."""
    try:
        return "levels" in json.loads(report.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, TypeError):
        return False


def _empty(out: Path) -> None:
    """Remove what an earlier run left in the output directory."""
    for name in OUTPUTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "requests").mkdir()
    (out / "logs").mkdir()
