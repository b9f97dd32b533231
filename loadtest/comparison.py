"""The whole load test: inputs checked, deployments started, measured and stopped, reports written."""

import importlib.util
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from loadtest import results, workload
from loadtest.arguments import Arguments
from loadtest.deployment import Deployment, attached, equal_kv_cache_bytes, is_url, started
from loadtest.inputs import make_workload, read_description, trained_on
from loadtest.load import Load
from loadtest.machine import describe_machine, describe_versions
from loadtest.memory import MemoryWatch
from loadtest.page import render
from loadtest.report import markdown
from loadtest.session import WARMUP_S, Plan, Session, Surroundings, measure
from models.atomic import write_json, write_text
from models.errors import LeanRecError, UsageError

OUTPUTS = ("report.json", "report.html", "report.md", "requests", "logs")
"""What a run writes, and what the next run into the same directory replaces."""

MIN_REQUESTS_A_BLOCK = 10

Progress = Callable[[str, float], None]


@dataclass(kw_only=True)
class Sides:
    """The two deployments, and the memory watches of those started here."""

    deployments: dict[str, Deployment] = field(default_factory=dict)
    watches: dict[str, MemoryWatch] = field(default_factory=dict)

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
    targets = arguments.targets
    described = {name: read_description(name, Path(t)) for name, t in targets.items() if not is_url(t)}
    sides = Sides(deployments={name: attached(name, t) for name, t in targets.items() if is_url(t)})
    data = arguments.data or trained_on(described.values())
    max_histories = [
        *(entry["prompt"]["max_history"] for entry in described.values()),
        *(running.model["max_history"] for running in sides.deployments.values()),
    ]
    plan = _plan(arguments)
    prompts = make_workload(
        data,
        max_history=min(max_histories),
        returning=arguments.returning,
        seed=arguments.seed,
        num_blocks=plan.num_blocks,
    )
    out = arguments.out or Path("runs", Path(data).name, "loadtest")
    _prepare(out)
    signal.signal(signal.SIGTERM, _interrupt)
    machine = describe_machine()
    session = Session(plan=plan)

    def write(incomplete: str | None) -> dict[str, Any]:
        report = results.build(
            session,
            sides.deployments,
            sides.watches,
            settings=_settings(arguments, data, plan, prompts),
            quality=results.read_quality(Path(arguments.pruned)),
            machine=machine,
            versions=describe_versions(),
            incomplete=incomplete,
        )
        write_text(out / "report.html", render(report))
        write_text(out / "report.md", markdown(report))
        write_json(out / "report.json", report)
        return report

    report = _run(arguments, sides, session, prompts, out=out, write=write)
    print(markdown(report))
    print(out / "report.html")
    if report["incomplete"]:
        raise LeanRecError(f"{report['incomplete']}\nwhat was measured until then: {out / 'report.html'}")
    return 0


def _run(
    arguments: Arguments,
    sides: Sides,
    session: Session,
    prompts: workload.Workload,
    *,
    out: Path,
    write: Callable[[str | None], dict[str, Any]],
) -> dict[str, Any]:
    """Start what has to be started, measure, and write the report before anything is stopped."""
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        workload.save(prompts, temporary / "workload.json")
        progress = stack.enter_context(_progress_bar(session.plan.expected_seconds))
        _start(stack, arguments, session.plan, sides, logs=out / "logs", progress=progress)
        try:
            surroundings = Surroundings(
                deployments=sides.deployments,
                workload=prompts,
                workload_path=temporary / "workload.json",
                rows=out / "requests",
                progress=progress,
                after_block=sides.sample_memory,
            )
            measure(session, surroundings)
        except LeanRecError as error:
            return write(str(error))
        except KeyboardInterrupt:
            write("interrupted")
            raise
        return write(None)


def _plan(arguments: Arguments) -> Plan:
    """Return what to measure.

    Raises:
        UsageError: a rate at which a block would hold next to nothing.
    """
    if not arguments.rates:
        return Plan(loads=[Load(users=users) for users in arguments.users], seconds=arguments.seconds)
    plan = Plan(loads=[Load(rate=rate) for rate in arguments.rates], seconds=arguments.seconds)
    expected = plan.loads[0].size * plan.window_s
    if expected < MIN_REQUESTS_A_BLOCK:
        raise UsageError(
            f"--rate {plan.loads[0].size:g} sends about {expected:.3g} requests in a block of "
            f"{plan.window_s:.3g} s, and {MIN_REQUESTS_A_BLOCK} are needed; raise --seconds or the rate"
        )
    return plan


def _start(
    stack: ExitStack, arguments: Arguments, plan: Plan, sides: Sides, *, logs: Path, progress: Progress
) -> None:
    """Start what is not attached, one after the other, so that neither start slows the other."""
    to_start = {name: Path(t) for name, t in arguments.targets.items() if name not in sides.deployments}
    running = list(sides.deployments.values())
    if to_start:
        waiting = max(load.expected_waiting for load in plan.loads)
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
    sides.sample_memory()


def _settings(arguments: Arguments, data: str, plan: Plan, prompts: workload.Workload) -> dict[str, Any]:
    return {
        "command": arguments.command,
        "data": data,
        "histories": len(prompts.histories),
        "max_history": prompts.max_history,
        "users": [load.users for load in plan.loads if load.users],
        "rates": [load.rate for load in plan.loads if load.rate],
        "seconds": plan.seconds,
        "pairs": plan.num_pairs,
        "window_seconds": plan.window_s,
        "warmup_seconds": WARMUP_S,
        "returning": arguments.returning,
        "seed": arguments.seed,
    }


def _prepare(out: Path) -> None:
    """Make the output directory, and remove what an earlier run left in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise LeanRecError(f"--out {out}: cannot be written ({error.strerror}); choose another") from error
    for name in OUTPUTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "requests").mkdir()
    (out / "logs").mkdir()


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


def _interrupt(signum: int, frame: Any) -> NoReturn:
    """End on SIGTERM as on Ctrl-C, so that the deployments started here are stopped."""
    raise KeyboardInterrupt
