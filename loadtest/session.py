"""The order of a load test: agreement, warm-up, the machine's noise, then both deployments at each load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from loadtest import http_json
from loadtest.answers import problem_with
from loadtest.blocks import LOCUST_START_S, BlockPlan, BlockRun
from loadtest.capacity import Capacity, find_capacity
from loadtest.deployment import Deployment, DeploymentDiedError
from loadtest.lag import check_lag
from loadtest.load import Load
from loadtest.runner import WARMUP_S, BlockRunner, Surroundings
from loadtest.served_quality import ServedQuality, TestUsers, ask_all
from loadtest.slo import MAX_STEPS, STEP_S, Objective
from loadtest.workload import Workload
from models.errors import LeanRecError

PAIRS = 6
"""Fewer give no interval (see compare.py), and nothing may be called a difference then."""
MIN_WINDOW_S = 1.0
FIRST_WARMUP_S = 3.0
AGREEMENT_PROMPTS = 100
K = 10
NOISE_SIDE = "full"
"""The deployment that is measured against itself."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be measured."""

    loads: Sequence[Load]
    """of one kind, rising"""
    seconds: float
    """measured time of each deployment at each load"""
    objective: Objective | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs of neighbouring blocks at each load: six, fewer where they would be too short."""
        return max(1, min(PAIRS, int(self.seconds / MIN_WINDOW_S)))

    @property
    def window_s(self) -> float:
        return self.seconds / self.num_pairs

    @property
    def first_noise_block(self) -> int:
        """The first part of the prompts for the noise, after those for the agreement and the warm-up."""
        return 2

    @property
    def first_level_block(self) -> int:
        """The first part for the loads. The halves of a noise pair go to one deployment: it needs two."""
        return self.first_noise_block + 2 * self.num_pairs

    @property
    def first_step_block(self) -> int:
        """The first part for the search for the highest rate."""
        return self.first_level_block + len(self.loads) * self.num_pairs

    @property
    def num_blocks(self) -> int:
        """Parts of the prompts."""
        return self.first_step_block + (MAX_STEPS if self.objective else 0)

    @property
    def expected_seconds(self) -> float:
        """How long it will take, about, once both deployments are up."""
        overhead = WARMUP_S + LOCUST_START_S
        measured = 2 * (1 + len(self.loads)) * self.num_pairs * (self.window_s + overhead)
        steps = 2 * MAX_STEPS * (STEP_S + overhead) if self.objective else 0.0
        return measured + steps + 2 * (FIRST_WARMUP_S + LOCUST_START_S)


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
    noise: tuple[list[BlockRun], list[BlockRun]] = field(default_factory=lambda: ([], []))
    """one deployment as if it were two, by pair"""
    runs: list[BlockRun] = field(default_factory=list)
    """measured blocks in the order they ran"""
    capacity: Capacity | None = None
    quality: ServedQuality | None = None
    asked: dict[int, int] = field(default_factory=dict)
    """requests of each part of the prompts that were sent to a deployment, at most"""

    def blocks_at(self, load: Load, deployment: str) -> list[BlockRun]:
        """Return a deployment's blocks at one load, by pair."""
        runs = [run for run in self.runs if run.plan.load == load and run.deployment == deployment]
        return sorted(runs, key=lambda run: run.plan.number)


def pair_order(pair: int) -> tuple[str, str]:
    """Return which deployment goes first: ABBA, then BAAB, so that a drift weighs on both alike."""
    return ("full", "pruned") if pair % 4 in (0, 3) else ("pruned", "full")


def measure(session: Session, surroundings: Surroundings, users: TestUsers | None) -> None:
    """Fill `session`.

    Args:
        users: Whom to measure quality on; None to leave it out.

    Raises:
        DeploymentDiedError, LeanRecError: `session` holds what was measured before.
    """
    plan = session.plan
    runner = BlockRunner(surroundings, plan.expected_seconds, session.asked)
    session.agreement = compare_answers(surroundings.deployments, surroundings.workload)
    session.asked[0] = len(session.agreement.overlap)
    heaviest = max(plan.loads, key=lambda load: load.size)
    for name in ("full", "pruned"):
        block = BlockPlan(number=1, load=heaviest, warmup_s=0, window_s=FIRST_WARMUP_S)
        runner.run(name, block, f"warm-up {name}")

    def measured(name: str, number: int, load: Load, label: str) -> BlockRun:
        block = BlockPlan(number=number, load=load, warmup_s=WARMUP_S, window_s=plan.window_s)
        run = runner.run(name, block, label)
        _check_answered(run)
        check_lag(run)
        return run

    for pair in range(plan.num_pairs):
        for half in (0, 1) if pair_order(pair)[0] == "full" else (1, 0):
            number = plan.first_noise_block + 2 * pair + half
            label = f"noise pair {pair + 1} {NOISE_SIDE} {'ab'[half]}"
            session.noise[half].append(measured(NOISE_SIDE, number, heaviest, label))
    number = plan.first_level_block
    for load in plan.loads:
        for pair in range(plan.num_pairs):
            for name in pair_order(pair):
                session.runs.append(measured(name, number, load, f"{load} pair {pair + 1} {name}"))
            number += 1
    if plan.objective:
        session.capacity = Capacity(objective=plan.objective)
        first_rates = {name: _throughput(session.blocks_at(heaviest, name)) for name in ("full", "pruned")}
        find_capacity(session.capacity, runner, first_rates, plan.first_step_block)
    if users:
        # Last: these histories would lie in the prefix caches.
        session.quality = ask_all(surroundings.deployments, users, surroundings.progress)


def _throughput(runs: Sequence[BlockRun]) -> float:
    """Return correct answers per second over blocks."""
    return sum(run.block.completed for run in runs) / sum(run.block.seconds for run in runs)


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
        kinds = "; ".join(f"{times} x {text}" for text, times in run.problems.items()) or "no answer in time"
        raise DeploymentDiedError(
            f"the {run.deployment} deployment gave no correct answer in {run.plan.window_s:g} s of load by "
            f"{run.plan.load} ({kinds}); raise --seconds if it is only slow"
        )
