"""Plots as inline SVG: no script, no font, nothing to fetch. Colours come from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 30, 46


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
    x_at = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y_at = _scale(0.0, top, HEIGHT - BOTTOM, TOP, False)
    ticks = log_ticks(min(xs), max(xs)) if log_x else sorted(set(xs))
    body = [_axes(x_label, y_label, y_at, linear_ticks(top))]
    for x in ticks:
        body.append(_text(x_at(x), HEIGHT - BOTTOM + 16, short(x), "tick middle"))
    for line in lines:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
        for index, (x, y) in enumerate(line.points if line.dots else ()):
            body.append(f'<circle class="dot {line.style}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>')
            whisker = line.whiskers[index] if line.whiskers else None
            if whisker:
                low, high = (f"{y_at(value):.1f}" for value in whisker)
                at = f"{x_at(x):.1f}"
                body.append(
                    f'<line class="whisker {line.style}" x1="{at}" x2="{at}" y1="{low}" y2="{high}"/>'
                )
    body.append(_legend([(line.name, line.style) for line in lines]))
    return _svg(title, body)


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
    body.append(_legend([(name, style) for name, _, style in stacks[0].parts], swatch="rect"))
    return _svg(title, body)


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
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "label middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label middle" transform="translate(14 {middle:.1f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]], swatch: str = "line") -> str:
    parts, x = [], float(LEFT)
    for name, style in entries:
        if swatch == "line":
            parts.append(f'<line class="line {style}" x1="{x:.0f}" x2="{x + 22:.0f}" y1="12" y2="12"/>')
        else:
            parts.append(f'<rect class="part {style}" x="{x:.0f}" y="6" width="14" height="12"/>')
        parts.append(_text(x + 28, 16, name, "legend"))
        x += 44 + 7 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(title: str, body: Sequence[str]) -> str:
    label = escape(title, quote=True)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "".join([opening, *body, "</svg>"])
