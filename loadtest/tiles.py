"""The page's few largest figures; what no interval tells from 1 is not shown as a difference here either."""

from collections.abc import Mapping
from html import escape
from typing import Any

from loadtest.load import load_of
from loadtest.report import at_least


def tiles(report: Mapping[str, Any]) -> str:
    """Return the figures that a reader looks for first; empty where nothing was measured."""
    if not report["levels"]:
        return ""
    ratios = report["speedup"]
    load = load_of(ratios)
    found = [(f"p95 with {load}", *_ratio(ratios, "p95", "as fast"))]
    if load.users is not None:  # at a rate both answer what is sent
        found.append((f"requests/s with {load}", *_ratio(ratios, "throughput", "as many")))
    if all(report["deployments"][name]["weights_bytes"] for name in ("full", "pruned")):
        found.append(("weights", *_share(report, "weights_bytes")))
    if ratios["memory"] is not None:
        found.append(("peak memory", f"{1 / ratios['memory']:.0%}", "of the full one's"))
    found += _capacity(report["capacity"])
    kept = _kept(report)
    if kept:
        found.append(("NDCG@10", *kept))
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{_small(note)}</dd></div>"
        for label, value, note in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def _small(note: str) -> str:
    """Return a note, its interval on a line of its own."""
    words, bracket, interval = note.partition(" [")
    return f"<small>{escape(words)}</small>" + (f" <small>[{escape(interval)}</small>" if bracket else "")


def _ratio(ratios: Mapping[str, Any], figure: str, different: str) -> tuple[str, str]:
    value, interval = ratios[figure], ratios["ci95"][figure]
    if interval is None:
        return "not shown", f"{value:.2f}×, too few blocks for an interval"
    stated = f"[{interval[0]:.2f}, {interval[1]:.2f}]"
    if interval[0] <= 1 <= interval[1]:
        return "no difference", f"shown, {value:.2f}× {stated}"
    return f"{value:.2f}×", f"{different} as the full one {stated}"


def _share(report: Mapping[str, Any], key: str) -> tuple[str, str]:
    full, pruned = (report["deployments"][name][key] for name in ("full", "pruned"))
    return f"{pruned / full:.0%}", "of the full one's"


def _capacity(found: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    if not found:
        return []
    pruned, full = (found[name]["requests_per_second"] for name in ("pruned", "full"))
    rates = [
        "no rate tried" if rate is None else f"{at_least(found[name])}{rate:.4g}/s"
        for name, rate in (("pruned", pruned), ("full", full))
    ]
    return [(f"highest rate with {found['objective']}", rates[0], f"full: {rates[1]}")]


def _kept(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what the sentence states: offline, where that was measured."""
    offline = report["quality"]
    kept = (offline or report["served_quality"] or {}).get("retained", {})
    if kept.get("ndcg@10") is None:
        return None
    interval = kept.get("ci95", {}).get("ndcg@10")
    stated = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    return f"{kept['ndcg@10']:.1%}", f"kept, {'offline' if offline else 'over HTTP'}{stated}"
