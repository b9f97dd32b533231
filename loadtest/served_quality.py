"""Quality as users get it: both deployments asked over HTTP for every test user."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from loadtest import compare, http_json
from loadtest.answers import problem_with
from loadtest.deployment import Deployment
from models.errors import LeanRecError
from models.metrics import intervals, means, paired, per_user_metrics, target_ranks

K = 10
SIDES = ("full", "pruned")
METRICS = ("hr@10", "ndcg@10")
ASKED_AT_ONCE = 8
MAX_HISTORY_SENT = 1000
"""The newest items; more than any prompt holds."""
SHOWN_USERS = 5
SHOWN_ITEMS = 5


@dataclass(frozen=True, kw_only=True)
class TestUsers:
    """Whom to ask for, and what came next."""

    __test__ = False  # for pytest

    user_ids: Sequence[str]
    histories: Sequence[Sequence[str]]
    """item ids, oldest first"""
    targets: Sequence[str]
    titles: Mapping[str, str]
    """of the whole catalogue, by item id"""
    evaluated: Mapping[str, Sequence[Sequence[str] | None]] | None = None
    """by deployment the ten item ids that the offline evaluation kept, where it asked for the user; None
    where there is none"""


@dataclass(frozen=True, kw_only=True)
class ServedQuality:
    """What both deployments recommend to the test users; the history is not masked, as in `evaluate`."""

    users: TestUsers
    lists: Mapping[str, Sequence[Sequence[str]]]
    """the ten item ids of each user, by deployment"""

    def to_json(self, offline: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
        """Return the part of the report.

        Args:
            offline: The metrics of the pruned directory's own report, where there is one.
        """
        rows = {item_id: row for row, item_id in enumerate(self.users.titles)}
        targets = np.array([rows[target] for target in self.users.targets])
        ranks = {
            name: target_ranks([[rows[item] for item in items] for items in self.lists[name]], targets)
            for name in SIDES
        }
        users = self.users.user_ids
        pairs = paired(ranks["full"], ranks["pruned"], seed=seed, users=users)
        top1, overlap = (
            compare.mean(values, seed=seed, users=users) for values in (self._same_top1(), self._overlap())
        )
        return {
            "users": len(targets),
            **{name: _metrics(ranks[name], users, seed) for name in SIDES},
            "retained": {
                **{metric: pairs[metric].retained for metric in METRICS},
                "ci95": {metric: pairs[metric].retained_ci95 for metric in METRICS},
            },
            "agreement": {
                "top1": top1.value,
                "overlap@10": overlap.value,
                "ci95": {"top1": top1.interval, "overlap@10": overlap.interval},
            },
            "offline": _beside_offline(ranks, offline),
            "offline_lists": self._beside_evaluated(),
            "most_different": self._most_different(ranks),
        }

    def _beside_evaluated(self) -> dict[str, Any] | None:
        """Return of how many users the list is the offline evaluation's to the last item."""
        if self.users.evaluated is None:
            return None
        found: dict[str, Any] = {}
        for name in SIDES:
            pairs = zip(self.lists[name], self.users.evaluated[name], strict=True)
            same = [list(ours) == list(theirs) for ours, theirs in pairs if theirs is not None]
            found[name] = {"users": len(same), "identical": sum(same)}
        return found

    def _same_top1(self) -> np.ndarray:
        pairs = zip(*(self.lists[name] for name in SIDES), strict=True)
        return np.array([full[0] == pruned[0] for full, pruned in pairs], np.float64)

    def _overlap(self) -> np.ndarray:
        pairs = zip(*(self.lists[name] for name in SIDES), strict=True)
        return np.array([len({*full} & {*pruned}) / max(len(full), 1) for full, pruned in pairs])

    def _most_different(self, ranks: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Return the users whose lists have least in common; among equals those whose target moved most."""
        gains = [per_user_metrics(ranks[name])["ndcg@10"] for name in SIDES]
        order = np.lexsort((-np.abs(gains[0] - gains[1]), self._overlap()))[:SHOWN_USERS]
        titles = self.users.titles
        return [
            {
                "user_id": self.users.user_ids[user],
                "overlap@10": float(self._overlap()[user]),
                "history": [titles.get(item, item) for item in self.users.histories[user][-SHOWN_ITEMS:]],
                "next": titles[self.users.targets[user]],
                **{name: [titles[item] for item in self.lists[name][user][:SHOWN_ITEMS]] for name in SIDES},
                "rank_of_next": {name: int(ranks[name][user]) or None for name in SIDES},
            }
            for user in order.tolist()
        ]


def ask_all(
    deployments: Mapping[str, Deployment], users: TestUsers, progress: Callable[[str, float], None]
) -> ServedQuality:
    """Return what both deployments recommend to every test user.

    Args:
        progress: Called often with a label and the share that is done (0 to 1).

    Raises:
        DeploymentDiedError, LeanRecError: an answer is missing or wrong.
    """
    item_ids = frozenset(users.titles)
    lists: dict[str, list[list[str]]] = {}
    for name in SIDES:
        ask = partial(_ask, deployments[name], item_ids)
        lists[name] = []
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            try:
                for items in pool.map(ask, users.histories):
                    lists[name].append(items)
                    progress(f"quality of {name}", len(lists[name]) / len(users.histories))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return ServedQuality(users=users, lists=lists)


def _ask(deployment: Deployment, item_ids: frozenset[str], history: Sequence[str]) -> list[str]:
    sent = list(history[-MAX_HISTORY_SENT:])
    body = {"history": sent, "k": K, "exclude_history": False}
    try:
        answer = http_json.post(f"{deployment.url}/recommend", body)
    except http_json.NoAnswerError as error:
        deployment.check_alive()
        raise LeanRecError(f"the {deployment.name} deployment gives no recommendations: {error}") from error
    problem = problem_with(answer, history=sent, k=K, item_ids=item_ids, excludes_history=False)
    if problem:
        raise LeanRecError(f"the {deployment.name} deployment answers wrongly: {problem}")
    return [str(item["item_id"]) for item in answer["items"]]


def _metrics(ranks: np.ndarray, users: Sequence[str], seed: int) -> dict[str, Any]:
    of_ten = per_user_metrics(ranks)
    values = {metric: of_ten[metric] for metric in METRICS}
    return {
        **means(values),
        "ci95": intervals(values, users, seed=seed),
    }


def _beside_offline(
    ranks: Mapping[str, np.ndarray], offline: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return served minus offline, where the offline evaluation was over as many users."""
    if offline is None:
        return None
    found: dict[str, Any] = {}
    for name in SIDES:
        metrics = offline["metrics"][name]
        if metrics.get("users") != len(ranks[name]):
            return None
        values = per_user_metrics(ranks[name])
        found[name] = {metric: float(values[metric].mean()) - metrics[metric] for metric in METRICS}
    return found
