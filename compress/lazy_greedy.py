"""One round of a greedy removal, which tries as few parts as bounds allow.

Lazy evaluation is of Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Part = TypeVar("Part", bound=Hashable)
Made = TypeVar("Made")


def cheapest(
    parts: Iterable[Part],
    bounds: Mapping[Part, float],
    rank: Callable[[Part], int],
    trial: Callable[[Part], tuple[float, Made]],
) -> tuple[Part, Made, dict[Part, float]]:
    """Return the part whose removal costs least, what its trial made, and the price of each part tried.

    With more gone already, a removal costs more, hardly ever less: its price of an earlier round bounds its
    price now. So parts are tried in the order of their bounds until one is below the next one's bound.

    Args:
        parts: what may go, at least one.
        bounds: at least of those; 0 before a part was ever tried.
        rank: of parts with equal prices the one with the least goes.
        trial: the price of a part's removal now, and what else came of it.
    """
    ordered = iter(sorted(parts, key=lambda part: (bounds[part], rank(part))))
    best = next(ordered)
    price, made = trial(best)
    prices = {best: price}
    for part in ordered:
        if prices[best] <= bounds[part]:
            break
        prices[part], made_now = trial(part)
        if (prices[part], rank(part)) < (prices[best], rank(best)):
            best, made = part, made_now
    return best, made, prices
