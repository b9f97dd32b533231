"""The whole load test: deployments started, measured and stopped, reports written."""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loadtest import results, workload
from loadtest.arguments import Arguments
from loadtest.deployment import Deployment, equal_kv_cache_bytes, started
from loadtest.empty import EmptyEngine, make_empty, measure_empty
from loadtest.memory import MemoryWatch
from loadtest.page import render
from loadtest.preparation import Preparation, log_header, prepare
from loadtest.processes import interrupt_on_sigterm
from loadtest.report import markdown
from loadtest.request_log import save_log
from loadtest.runner import Surroundings
from loadtest.session import Session, measure
from models.atomic import write_json, write_text
from models.errors import LeanRecError

Progress = Callable[[str, float], None]


@dataclass(kw_only=True)
class Sides:
    """The two deployments, and the memory watches of those started here."""

    deployments: dict[str, Deployment] = field(default_factory=dict)
    watches: dict[str, MemoryWatch] = field(default_factory=dict)
    empty: EmptyEngine | None = None

    def sample_memory(self) -> None:
        for watch in self.watches.values():
            watch.take()


def compare_deployments(arguments: Arguments) -> int:
    """Run the load test and return the exit code.

    Raises:
        UsageError: an input that cannot be measured.
        LeanRecError: the test could not start, or ended early; a partial report is kept then.
    """
    if importlib.util.find_spec("locust") is None:
        raise LeanRecError("Locust is not installed; install it with: pip install 'leanrec[loadtest]'")
    preparation = prepare(arguments)
    out, sides = preparation.out, Sides(deployments=dict(preparation.attached))
    interrupt_on_sigterm()
    session = Session(plan=preparation.plan)

    def write(incomplete: str | None) -> dict[str, Any]:
        report = results.build(
            session,
            sides.deployments,
            sides.watches,
            **preparation.known,
            empty=sides.empty,
            incomplete=incomplete,
        )
        write_text(out / "report.html", render(report))
        write_text(out / "report.md", markdown(report))
        write_json(out / "report.json", report)
        return report

    report = _run(arguments, preparation, sides, session, write)
    print(markdown(report))
    print(out / "report.html")
    if report["incomplete"]:
        raise LeanRecError(f"{report['incomplete']}\nwhat was measured until then: {out / 'report.html'}")
    if arguments.save_requests:
        _save_requests(arguments.save_requests, preparation, session)
    failures = [failure for condition in arguments.fail_if if (failure := condition.failure(report))]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _run(
    arguments: Arguments,
    preparation: Preparation,
    sides: Sides,
    session: Session,
    write: Callable[[str | None], dict[str, Any]],
) -> dict[str, Any]:
    """Start what has to be started, measure, and write the report before anything is stopped."""
    out = preparation.out
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        workload.save(preparation.workload, temporary / "workload.json")
        progress = stack.enter_context(_progress_bar(session.plan.expected_seconds))
        waiting = max(load.expected_waiting for load in session.plan.loads)
        try:
            _start(stack, arguments, preparation, sides, waiting, progress=progress)
            surroundings = Surroundings(
                deployments=sides.deployments,
                workload=preparation.workload,
                workload_path=temporary / "workload.json",
                rows=out / "requests",
                progress=progress,
                after_block=sides.sample_memory,
                generator=preparation.generator,
            )
            for line in preparation.generator.notices():
                tqdm.write(line, file=sys.stderr)
            measure(session, surroundings, preparation.users)
        except LeanRecError as error:
            return write(str(error))
        except KeyboardInterrupt:
            write("interrupted")
            raise
        return write(None)


def _start(
    stack: ExitStack,
    arguments: Arguments,
    preparation: Preparation,
    sides: Sides,
    waiting: int,
    *,
    progress: Progress,
) -> None:
    """Start what is not attached, one after the other, so that neither start slows the other.

    Args:
        waiting: Requests that are answered at the same time, about.
    """
    to_start = {name: Path(t) for name, t in arguments.targets.items() if name not in sides.deployments}
    running = list(sides.deployments.values())
    logs = preparation.out / "logs"
    if to_start:
        kv_cache_bytes = equal_kv_cache_bytes(list(to_start.values()), running, waiting)
    for name, directory in to_start.items():
        log = logs / f"serve-{name}.log"
        tqdm.write(f"starting the {name} deployment, log in {log}", file=sys.stderr)

        def watch(pid: int, name: str = name) -> None:
            if name not in sides.watches:
                sides.watches[name] = MemoryWatch(pid)
            progress(f"starting {name}", 0.0)

        sides.deployments[name] = stack.enter_context(
            started(name, directory, kv_cache_bytes=kv_cache_bytes, log=log, on_wait=watch)
        )
        if name in sides.watches:
            sides.watches[name].ready()
    if to_start:
        like = to_start.get("pruned") or to_start["full"]
        sides.empty = _beside_an_empty_engine(like, kv_cache_bytes, sides, logs, progress)
    sides.sample_memory()


def _beside_an_empty_engine(
    like: Path, kv_cache_bytes: int, sides: Sides, logs: Path, progress: Progress
) -> EmptyEngine | None:
    """Start an engine with next to no model for a moment, and return what the deployments take above it."""
    tqdm.write("starting an empty engine, to tell the models' own memory", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="loadtest-empty-") as folder,
        started(
            "empty",
            make_empty(like, Path(folder) / "empty"),
            kv_cache_bytes=kv_cache_bytes,
            log=logs / "serve-empty.log",
            on_wait=lambda pid: progress("starting an empty engine", 0.0),
        ) as empty,
    ):
        return measure_empty(empty, sides.deployments.values())


def _save_requests(path: Path, preparation: Preparation, session: Session) -> None:
    """Save what both deployments were asked, but for the search, whose rates follow from the answers."""
    measured = [*session.noise[0], *session.noise[1], *session.runs]
    rates = {run.plan.number: run.plan.load.rate for run in measured if run.plan.load.rate}
    heaviest = session.plan.loads[-1]
    if heaviest.rate:
        # The warm-up.
        rates[1] = heaviest.rate
    first_step = session.plan.first_step_block
    asked = {block: number for block, number in session.asked.items() if block < first_step}
    header = log_header(preparation.known["settings"])
    save_log(path, preparation.workload, header=header, asked=asked, rates=rates)


@contextmanager
def _progress_bar(expected_seconds: float) -> Iterator[Progress]:
    """Yield a function that shows what is being done, the share that is done and the time left."""
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone{postfix}"
    with tqdm(total=1.0, bar_format=layout, file=sys.stderr, mininterval=1.0) as bar:
        shown_at = 0.0

        def show(label: str, share: float) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at < 1.0:
                return
            shown_at = time.monotonic()
            share = min(share, 1.0)
            bar.set_description_str(label, refresh=False)
            bar.set_postfix_str(f"{tqdm.format_interval(expected_seconds * (1 - share))} left", refresh=False)
            bar.n = share
            bar.refresh()

        yield show
