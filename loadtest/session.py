"""The order of a load test: agreement, warm-up, then blocks of the two deployments in turn at each load."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from loadtest import http_json
from loadtest.answers import problem_with
from loadtest.blocks import LOCUST_START_S, BlockPlan, BlockRun, run_block
from loadtest.deployment import Deployment, DeploymentDiedError
from loadtest.report import count
from loadtest.workload import Workload
from models.errors import LeanRecError

MAX_PAIRS = 6
MIN_WINDOW_S = 1.0
WARMUP_S = 1.0
FIRST_WARMUP_S = 3.0
AGREEMENT_PROMPTS = 100
K = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be measured."""

    users: Sequence[int]
    seconds: float
    """measured time of each deployment at each number of users"""

    @property
    def num_pairs(self) -> int:
        """Pairs of neighbouring blocks at each number of users: six, fewer where they would be too short."""
        return max(1, min(MAX_PAIRS, int(self.seconds / MIN_WINDOW_S)))

    @property
    def window_s(self) -> float:
        return self.seconds / self.num_pairs

    @property
    def num_blocks(self) -> int:
        """Parts of the prompts: one for the agreement, one for the warm-up, one for each pair."""
        return 2 + len(self.users) * self.num_pairs

    @property
    def expected_seconds(self) -> float:
        """How long it will take, about, once both deployments are up."""
        overhead = WARMUP_S + LOCUST_START_S
        measured = 2 * len(self.users) * self.num_pairs * (self.window_s + overhead)
        return measured + 2 * (FIRST_WARMUP_S + LOCUST_START_S)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike the two deployments' answers to the same prompts are; one value a prompt, `[prompts]`."""

    same_top1: np.ndarray
    overlap: np.ndarray
    """share of the first ten items that both list"""


@dataclass(kw_only=True)
class Session:
    """What has been measured so far; what is there can be reported when the rest fails."""

    plan: Plan
    agreement: Agreement | None = None
    runs: list[BlockRun] = field(default_factory=list)
    """measured blocks in the order they ran"""

    def blocks_at(self, users: int, deployment: str) -> list[BlockRun]:
        """Return a deployment's blocks at one load, by pair."""
        runs = [run for run in self.runs if run.plan.users == users and run.deployment == deployment]
        return sorted(runs, key=lambda run: run.plan.number)


def pair_order(pair: int) -> tuple[str, str]:
    """Return which deployment goes first: ABBA, then BAAB, so that a drift weighs on both alike."""
    return ("full", "pruned") if pair % 4 in (0, 3) else ("pruned", "full")


def measure(
    session: Session,
    deployments: Mapping[str, Deployment],
    workload: Workload,
    *,
    workload_path: Path,
    rows: Path,
    progress: Callable[[str, float], None],
    after_block: Callable[[], None],
) -> None:
    """Fill `session`.

    Args:
        workload_path: Where `workload` is saved for Locust.
        rows: Folder for each block's CSV and log.
        progress: Called often with what is being done and the share that is done (0 to 1).
        after_block: Called while nothing is being measured.

    Raises:
        DeploymentDiedError, LeanRecError: `session` holds what was measured before.
    """
    plan, done = session.plan, 0.0

    def run(name: str, block: BlockPlan, label: str) -> BlockRun:
        nonlocal done
        expected = block.warmup_s + block.window_s + LOCUST_START_S
        began = time.monotonic()

        def tick() -> None:
            progress(label, (done + min(expected, time.monotonic() - began)) / plan.expected_seconds)

        run = run_block(deployments[name], block, workload_path, rows / label.replace(" ", "-"), tick)
        done += expected
        after_block()
        return run

    session.agreement = compare_answers(deployments, workload)
    for name in ("full", "pruned"):
        block = BlockPlan(number=1, users=max(plan.users), warmup_s=0, window_s=FIRST_WARMUP_S)
        run(name, block, f"warm-up {name}")
    number = 2
    for users in plan.users:
        for pair in range(plan.num_pairs):
            for name in pair_order(pair):
                block = BlockPlan(number=number, users=users, warmup_s=WARMUP_S, window_s=plan.window_s)
                session.runs.append(run(name, block, f"{count(users, 'user')} pair {pair + 1} {name}"))
                _check_answered(session.runs[-1])
            number += 1


def compare_answers(deployments: Mapping[str, Deployment], workload: Workload) -> Agreement:
    """Ask both deployments the same questions and return how alike the answers are.

    Raises:
        DeploymentDiedError, LeanRecError: an answer is missing or wrong.
    """
    item_ids = frozenset(workload.item_ids)
    prompts = list(islice(workload.prompts(0), AGREEMENT_PROMPTS))
    answers = {
        name: [_ask(deployment, prompt, item_ids) for prompt in prompts]
        for name, deployment in deployments.items()
    }
    pairs = list(zip(answers["full"], answers["pruned"], strict=True))
    return Agreement(
        same_top1=np.array([full[0] == pruned[0] for full, pruned in pairs], np.float64),
        overlap=np.array([len({*full} & {*pruned}) / len(full) for full, pruned in pairs]),
    )


def _ask(deployment: Deployment, history: Sequence[str], item_ids: frozenset[str]) -> list[str]:
    try:
        answer = http_json.post(f"{deployment.url}/recommend", {"history": history, "k": K})
    except http_json.NoAnswerError as error:
        deployment.check_alive()
        raise LeanRecError(f"the {deployment.name} deployment gives no recommendations: {error}") from error
    problem = problem_with(answer, history=history, k=K, item_ids=item_ids)
    if problem:
        raise LeanRecError(f"the {deployment.name} deployment answers wrongly: {problem}")
    return [str(item["item_id"]) for item in answer["items"]]


def _check_answered(run: BlockRun) -> None:
    """Raise at the first block without an answer: the rest of the run would be waiting for nothing."""
    if run.block.completed == 0 or len(run.block.latencies_ms) == 0:
        kinds = "; ".join(f"{count} x {text}" for text, count in run.problems.items()) or "no answer in time"
        raise DeploymentDiedError(
            f"the {run.deployment} deployment gave no correct answer in {run.plan.window_s:g} s of load by "
            f"{count(run.plan.users, 'user')} ({kinds}); raise --seconds if it is only slow"
        )
