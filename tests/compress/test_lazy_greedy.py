"""The cheapest part is found, whatever the bounds spare."""

from hypothesis import given
from hypothesis import strategies as st

from compress.lazy_greedy import cheapest

PRICES = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@given(PRICES, st.data())
def test_bounds_spare_trials_and_change_nothing(prices, data):
    bounds = {part: data.draw(st.integers(0, price)) for part, price in enumerate(prices)}
    ranks = data.draw(st.permutations(range(len(prices))))
    asked = []

    def trial(part):
        asked.append(part)
        return float(prices[part]), f"without {part}"

    best, made, tried = cheapest(bounds, bounds, ranks.__getitem__, trial)
    # Of equals one may not have been tried: its bound says that it cannot be cheaper.
    assert prices[best] == min(prices)
    assert made == f"without {best}"
    assert tried == {part: prices[part] for part in asked}
    assert best == min(asked, key=lambda part: (prices[part], ranks[part]))
    assert all(bounds[part] >= prices[best] for part in bounds if part not in tried)


def test_a_part_whose_bound_is_no_lower_is_not_tried():
    prices, bounds = {"a": 2.0, "b": 1.0, "c": 9.0}, {"a": 0.0, "b": 0.5, "c": 1.0}
    best, _, tried = cheapest(bounds, bounds, lambda part: 0, lambda part: (prices[part], None))
    assert best == "b"
    assert list(tried) == ["a", "b"]
