"""The highest rate of each deployment that meets an objective, by short steps of an open loop in turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.blocks import BlockPlan, BlockRun
from loadtest.lag import lag_problem
from loadtest.load import Load
from loadtest.runner import WARMUP_S, BlockRunner
from loadtest.slo import MAX_STEPS, Objective, RateSearch, cost_per_million, window_s


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rate that was tried."""

    run: BlockRun
    share_in_time: float
    met: bool
    problem: str | None
    """why the step says nothing about the deployment: the generator could not keep its schedule"""


@dataclass(kw_only=True)
class Capacity:
    """What the search has found so far."""

    objective: Objective
    searches: dict[str, RateSearch] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)

    def to_json(self, price_per_hour: float | None) -> dict[str, Any]:
        """Return the part of the report."""
        return {
            "objective": self.objective.text,
            "price_per_hour": price_per_hour,
            **{name: self._side(name, price_per_hour) for name in self.searches},
        }

    def _side(self, name: str, price_per_hour: float | None) -> dict[str, Any]:
        search, steps = self.searches[name], self.steps[name]
        cost = cost_per_million(price_per_hour, search.met) if price_per_hour and search.met else None
        why = None if search.met else "no rate that was tried met the objective"
        return {
            "requests_per_second": search.met,
            "missed_at": search.missed,
            "cost_per_million": cost,
            "limited_by_generator": any(
                step.problem is not None and step.run.plan.load.rate == search.missed for step in steps
            ),
            "why_null": why,
            "steps": [
                {
                    "rate": step.run.plan.load.rate,
                    "seconds": step.run.block.seconds,
                    "requests": step.run.block.sent,
                    "share_in_time": step.share_in_time,
                    "met": step.met,
                    "problem": step.problem,
                }
                for step in steps
            ],
        }


def find_capacity(
    capacity: Capacity, runner: BlockRunner, first_rates: Mapping[str, float], first_block: int
) -> None:
    """Fill `capacity`.

    Args:
        first_rates: Where to begin, for each deployment.
        first_block: The first of `MAX_STEPS` parts of the prompts.

    Raises:
        DeploymentDiedError, LeanRecError: `capacity` holds what was found before.
    """
    for name, rate in first_rates.items():
        capacity.searches[name], capacity.steps[name] = RateSearch(rate), []
    for number in range(MAX_STEPS):
        for name, search in capacity.searches.items():
            rate = search.next_rate()
            plan = BlockPlan(
                number=first_block + number,
                load=Load(rate=rate),
                warmup_s=WARMUP_S,
                window_s=window_s(rate),
            )
            run = runner.run(name, plan, f"objective step {number + 1} {name}")
            problem = lag_problem(run)
            met = problem is None and capacity.objective.is_met(run.block)
            share = capacity.objective.share_in_time(run.block)
            capacity.steps[name].append(Step(run=run, share_in_time=share, met=met, problem=problem))
            search.record(rate, met)
