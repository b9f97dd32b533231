"""The users whose recommendations differ most between the deployments, for a person to look at."""

from collections.abc import Mapping
from html import escape
from typing import Any

LABELS = {"full": "full recommends", "pruned": "pruned recommends"}


def differing_users(served: Mapping[str, Any] | None) -> str:
    """Return a foldable part of the page; empty where quality was not measured."""
    if not served or not served["most_different"]:
        return ""
    parts = ["<details><summary>Users for whom the two differ most</summary>"]
    for user in served["most_different"]:
        rows = [("latest of the history", _titles(user["history"])), ("came next", escape(user["next"]))]
        for name, label in LABELS.items():
            rank = user["rank_of_next"][name]
            place = f"what came next: place {rank}" if rank else "what came next: not among ten"
            rows.append((f"{label} ({place})", _titles(user[name])))
        parts.append(f"<h3>User {escape(str(user['user_id']))}: overlap {user['overlap@10']:.0%}</h3><dl>")
        parts += [f"<dt>{escape(label)}</dt><dd>{titles}</dd>" for label, titles in rows]
        parts.append("</dl>")
    return "".join([*parts, "</details>"])


def _titles(titles: list[str]) -> str:
    return " · ".join(map(escape, titles)) or "nothing"
