"""Whose cases, and which, a pruned model loses what it loses on: NDCG@10 of a compression's test lists.

    python -m benchmarks.quality.losses --run DIR --data D [--users 2] [--other DIR]

Some data have many cases of one user, who may do one thing again and again. Prints JSON: all cases, those
whose item is the last of the history again, the others, and all without the users that lose most together.
With another result, also this one's metrics less the other's, over cases and with each user counted once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.quality.sasrec_rows import baseline_ranks
from models.data import Dataset, load_data
from models.metrics import paired, per_user_metrics, target_ranks, user_weights
from models.ranked_lists import RANKED_LISTS

SIDES = ("full", "pruned")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.losses")
    parser.add_argument("--run", type=Path, required=True, help="directory that `compress` wrote")
    parser.add_argument("--data", required=True)
    parser.add_argument("--users", type=int, default=2, help="how many of those that lose most to leave out")
    parser.add_argument("--other", type=Path, help="another result: how the pruned models compare")
    options = parser.parse_args()
    data = load_data(options.data)
    test = data.test
    ranks = _ranks(options.run, data)
    bigram = per_user_metrics(baseline_ranks(data, "bigram", test))["ndcg@10"]
    users = np.array(test.histories.user_ids)
    gains = [per_user_metrics(ranked)["ndcg@10"] for ranked in ranks]
    names, owner = np.unique(users, return_inverse=True)
    lost = np.bincount(owner, gains[0] - gains[1])
    most = np.argsort(-lost)[: options.users]
    again = np.array([test.histories[i][-1] == test.targets[i] for i in range(len(test))])

    def of(cases: np.ndarray) -> dict[str, Any]:
        found = paired(ranks[0][cases], ranks[1][cases], users=users[cases].tolist())["ndcg@10"]
        return {
            "cases": int(cases.sum()),
            "users": len(set(users[cases].tolist())),
            **{side: float(gain[cases].mean()) for side, gain in zip(SIDES, gains, strict=True)},
            "bigram": float(bigram[cases].mean()),
            "kept": found.retained,
            "kept_ci95": found.retained_ci95,
            "share_of_loss": float((gains[0] - gains[1])[cases].sum() / lost.sum()),
        }

    result = {
        "all": of(np.ones(len(test), bool)),
        "the last item again": of(again),
        "another item": of(~again),
        "users that lose most": {
            str(names[user]): {"cases": int((owner == user).sum()), "share_of_loss": lost[user] / lost.sum()}
            for user in most
        },
        "without them": of(~np.isin(owner, most)),
    }
    if options.other:
        theirs = _ranks(options.other, data)[1]
        owners = users.tolist()
        result["this run less the other"] = {
            how: {
                name: {"difference": found.difference, "ci95": found.difference_ci95}
                for name, found in paired(ranks[1], theirs, users=owners, weights=weights).items()
            }
            for how, weights in (("over cases", None), ("each user once", user_weights(owners)))
        }
    print(json.dumps(result, indent=1))


def _ranks(run: Path, data: Dataset) -> list[np.ndarray]:
    """Return each test target's rank by the full and by the pruned model."""
    test, ids, rows = data.test, data.catalog.item_ids, data.catalog.row_of
    if not (run / RANKED_LISTS).is_file():
        raise SystemExit(f"losses: {run} has no {RANKED_LISTS}; name a directory that `compress` wrote")
    table = pq.read_table(run / RANKED_LISTS).to_pydict()  # in the order of the test part
    if table["target"] != [ids[target] for target in test.targets]:
        raise SystemExit(f"losses: {run} was not tested on these data")
    return [
        target_ranks([[rows[item] for item in ranked] for ranked in table[side]], test.targets)
        for side in SIDES
    ]


if __name__ == "__main__":
    main()
