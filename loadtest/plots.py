"""Plots as inline SVG: no script, no font, nothing to fetch. Colours come from the page's style sheet.

They are drawn small, so that their text is still read on a phone; legends are HTML, which wraps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 30, 46
DOT = 12
"""From the frame's edge to the nearest dot, so that it is drawn whole"""
DODGE = 30
"""Between the dots of a chart's only load, which would cover one another"""
CHARACTER = 9
"""Width of a tick label's character, generously"""


@dataclass(frozen=True)
class Line:
    """One curve; `style` holds CSS classes, `whiskers` an interval (low, high) or None at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    whiskers: Sequence[tuple[float, float] | None] = ()
    dots: bool = False


@dataclass(frozen=True)
class Stack:
    """One bar of a stacked bar chart: (name, size, CSS class) from the bottom up."""

    name: str
    parts: Sequence[tuple[str, float, str]]


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, y_label: str, log_x: bool = False, y_max: float = 0.0
) -> str:
    """Return curves on shared axes; y begins at zero."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [high for line in lines for whisker in line.whiskers if whisker for high in whisker]
    top = y_max or max(ys) * 1.05
    inset = DOT if any(line.dots for line in lines) else 0
    x_at = _scale(min(xs), max(xs), LEFT + inset, WIDTH - RIGHT - inset, log_x)
    y_at = _scale(0.0, top, HEIGHT - BOTTOM, TOP, False)
    ticks = log_ticks(min(xs), max(xs)) if log_x else sorted(set(xs))
    body = [_axes(x_label, y_label, y_at, linear_ticks(top))]
    for x in _apart(ticks, x_at):
        body.append(_text(x_at(x), HEIGHT - BOTTOM + 18, short(x), "tick middle"))
    for number, line in enumerate(lines):
        shift = DODGE * (number - (len(lines) - 1) / 2) if min(xs) == max(xs) else 0.0
        path = " ".join(f"{x_at(x) + shift:.1f},{y_at(y):.1f}" for x, y in line.points)
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
        for index, (x, y) in enumerate(line.points if line.dots else ()):
            at = f"{x_at(x) + shift:.1f}"
            body.append(f'<circle class="dot {line.style}" cx="{at}" cy="{y_at(y):.1f}" r="3.5"/>')
            whisker = line.whiskers[index] if line.whiskers else None
            if whisker:
                low, high = (f"{y_at(value):.1f}" for value in whisker)
                body.append(
                    f'<line class="whisker {line.style}" x1="{at}" x2="{at}" y1="{low}" y2="{high}"/>'
                )
    return _legend([(line.name, f"line {line.style}") for line in lines]) + _svg(title, body)


def stacked_bars(stacks: Sequence[Stack], *, title: str, y_label: str) -> str:
    """Return one bar a stack, with a legend of the parts and the sum on top."""
    top = max(sum(size for _, size, _ in stack.parts) for stack in stacks) * 1.12
    y_at = _scale(0.0, top, HEIGHT - BOTTOM, TOP, False)
    body = [_axes("", y_label, y_at, linear_ticks(top))]
    slot = (WIDTH - LEFT - RIGHT) / len(stacks)
    for index, stack in enumerate(stacks):
        left, base = LEFT + slot * (index + 0.25), 0.0
        for name, size, style in stack.parts:
            y, height = y_at(base + size), y_at(base) - y_at(base + size)
            body.append(
                f'<rect class="part {style}" x="{left:.1f}" y="{y:.1f}" width="{slot / 2:.1f}" '
                f'height="{height:.1f}"><title>{escape(f"{stack.name}: {name} {short(size)}")}</title></rect>'
            )
            base += size
        centre = left + slot / 4
        body.append(_text(centre, y_at(base) - 6, short(base), "value middle"))
        body.append(_text(centre, HEIGHT - BOTTOM + 18, stack.name, "name middle"))
    entries = {name: f"part {style}" for stack in stacks for name, _, style in stack.parts}
    return _legend(list(entries.items())) + _svg(title, body)


def linear_ticks(top: float) -> list[float]:
    """Return round values from 0 to `top`, four to eight of them."""
    step: float = 10.0 ** math.floor(math.log10(top))
    for factor in (0.1, 0.2, 0.25, 0.5, 1, 2):
        if top / (step * factor) <= 7:
            step *= factor
            break
    return [index * step for index in range(int(top / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, 20, ... within the range; the ends where it holds fewer than two of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 1 else [low, high]


def short(value: float) -> str:
    """Return a number as an axis shows it."""
    if value >= 1e5:
        return f"{value / 1e3:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    transform: Callable[[float], float] = math.log if log else float
    first, span = transform(low), transform(high) - transform(low)
    if span == 0:
        return lambda value: (start + end) / 2
    return lambda value: start + (transform(value) - first) / span * (end - start)


def _axes(x_label: str, y_label: str, y_at: Callable[[float], float], ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        y = f"{y_at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 8, y_at(tick) + 4, short(tick), "tick end"))
    if x_label:
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "label middle"))
    parts.append(_text(4, 14, y_label, "label"))
    return "".join(parts)


def _apart(ticks: Sequence[float], x_at: Callable[[float], float]) -> list[float]:
    """Return the ticks whose labels do not touch: the last, and those that keep clear of the next kept."""
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        room = CHARACTER * (len(short(tick)) + len(short(kept[-1]))) / 2 if kept else 0.0
        if not kept or x_at(kept[-1]) - x_at(tick) >= room:
            kept.append(tick)
    return kept[::-1]


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return (name, CSS classes of its mark) in a row that wraps."""
    keys = "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for name, style in entries)
    return f'<p class="legend">{keys}</p>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(title: str, body: Sequence[str]) -> str:
    label = escape(title, quote=True)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "".join([opening, *body, "</svg>"])
