"""From a target such as `5%` to the shapes of the three stages. Pure arithmetic on the config."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from compress.int8_shapes import shape_loads_in_int8
from models.errors import UsageError
from models.families import ParameterCounts, Shape, Traits, count_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

THREE_CUTS = (("width",), ("mlp",), ("depth",))
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
SMALLEST_HIDDEN = 16
SMALLEST_MLP = 8
HIDDEN_STEPS = (64, 32, 16)
"""spacing of the hidden sizes tried: the widest that leaves 16 to choose from, finer ones if none fits"""
# Share of the log of the cut that depth takes; the rest falls on width, where parameters go with the
# square. At 5 % it keeps three layers in ten and four tenths of the width.
DEPTH_SHARE = 0.4
LEAST_HIDDEN = 64
"""below it the price is steep: a judgement, not a measurement"""
SHALLOW = 6
"""layers for which the learning rate of stages that mend was measured; so few are never halved on the way"""


@dataclass(frozen=True)
class Plan:
    """The way from the full shape to one within the budget."""

    target_text: str
    budget: int
    """non-embedding parameters the result may have at most"""
    full: Shape
    cuts: tuple[tuple[str, ...], ...]
    """of each stage: `width` (heads and hidden size), `mlp`, `halving` (of the layers), `depth`; none where
    weights start at random"""
    stages: tuple[Shape, ...]
    """after each stage"""
    traits: Traits
    """of the result: `vocab_size` is the trimmed one where the vocabulary is"""
    full_vocab_size: int

    @property
    def final(self) -> Shape:
        return self.stages[-1]

    @property
    def counts(self) -> tuple[ParameterCounts, ...]:
        """Parameters of the full model and after each stage."""
        full = count_parameters(self.full, replace(self.traits, vocab_size=self.full_vocab_size))
        return full, *(count_parameters(shape, self.traits) for shape in self.stages)

    @property
    def full_count(self) -> int:
        return self.counts[0].non_embedding

    @property
    def stage_counts(self) -> tuple[int, ...]:
        """Non-embedding parameters after each stage."""
        return tuple(count.non_embedding for count in self.counts[1:])

    @property
    def stage_names(self) -> tuple[str, ...]:
        """What each stage cuts, for people and for the steps of the work."""
        return tuple("+".join(cuts) or "random" for cuts in self.cuts)

    def with_vocabulary(self, size: int) -> "Plan":
        """Return the plan whose stages all have a vocabulary of another size."""
        return replace(self, traits=replace(self.traits, vocab_size=size))

    def describe(self) -> str:
        """Return the plan as text: shapes and parameters before, after each stage and at the end."""
        counts = self.counts
        kept = counts[-1].non_embedding
        lines = [
            f"target {self.target_text}: keep {kept:,} of {self.full_count:,} non-embedding parameters "
            f"({kept / self.full_count:.2%}; at most {self.budget:,})",
            "",
            _row("", "full", *(f"{n} {name}" for n, name in enumerate(self.stage_names, 1))),
        ]
        shapes = (self.full, *self.stages)
        for label, field in (
            ("layers", "num_layers"),
            ("hidden size", "hidden_size"),
            ("query heads", "num_heads"),
            ("KV heads", "num_kv_heads"),
            ("head size", "head_dim"),
            ("MLP width", "intermediate_size"),
        ):
            lines.append(_row(label, *(f"{getattr(shape, field):,}" for shape in shapes)))
        sizes = (self.full_vocab_size, *[self.traits.vocab_size] * len(self.stages))
        lines += [_row("vocabulary", *(f"{size:,}" for size in sizes)), ""]
        for part in ("attention", "mlp", "norm", "non_embedding", "embedding", "head", "total"):
            lines.append(_row(part.replace("_", "-"), *(f"{getattr(count, part):,}" for count in counts)))
        shares = (f"{count.non_embedding / self.full_count:.2%}" for count in counts)
        lines.append(_row("kept", *shares))
        lines.append(_row("kept of total", *(f"{count.total / counts[0].total:.2%}" for count in counts)))
        if self.traits.writes_llama(self.final):
            lines += ["", "stored as LlamaForCausalLM: vLLM's Qwen2 cannot hold this head size"]
        return "\n".join(lines)


def _row(label: str, *cells: str) -> str:
    return f"{label:<14}" + "".join(f" {cell:>14}" for cell in cells)


def parse_target(text: str, full_count: int) -> int:
    """Return how many non-embedding parameters a target allows.

    Args:
        text: a percentage `5%`, a share `0.05`, or a count `20M`, `1500K`, `20000000`.
        full_count: non-embedding parameters of the full model.

    Raises:
        UsageError: not such a text, nothing kept, or nothing removed.
    """
    forms = "use a percentage (5%), a share below 1 (0.05) or a number of parameters (20M)"
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([%KMB]?)\s*", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise UsageError(f"target {text!r} is not a size; {forms}")
    number, unit = Fraction(match[1]), match[2].upper()
    if unit == "%":
        number = number / 100
    share = unit == "%" or (unit == "" and "." in match[1])
    if number == 0:
        raise UsageError(f"target {text!r} keeps nothing; {forms}")
    if share and number >= 1:
        raise UsageError(f"target {text!r} removes nothing: it is the whole model or more; {forms}")
    budget = math.floor(number * full_count if share else number * UNITS[unit])
    if budget >= full_count:
        raise UsageError(f"target {text!r} removes nothing: the model has {full_count:,} parameters; {forms}")
    return budget


def make_plan(
    config: "PretrainedConfig",
    target_text: str,
    *,
    cuts: Sequence[tuple[str, ...]] = THREE_CUTS,
    shape: Literal["all", "width", "depth"] = "all",
    int8: bool = False,
) -> Plan:
    """Return the shapes whose last has at most the target's parameters and at most 1 % fewer.

    Args:
        cuts: what each stage cuts; `halving` once for each time the layers are halved on the way.
        shape: `width` keeps every layer; `depth` keeps the hidden size, and of heads and MLP what fits.
        int8: take a shape whose matrices all load in int8 wherever vLLM runs, where there is one.

    Among all that fit, the one nearest to what keeps quality and speed: layers and width cut in the
    proportion `DEPTH_SHARE`, MLP and attention as wide for the hidden size as before (within 1.5 to 4
    and at least 0.75), and sizes that are multiples of 64 where there is room.

    Raises:
        UsageError: the target is no size, or no shape reaches it; names the smallest that can be reached.
    """
    full, traits = Shape.of(config), Traits.of(config)
    full_count = count_parameters(full, traits).non_embedding
    budget = parse_target(target_text, full_count)
    smallest = _smallest(full)
    smallest_count = count_parameters(smallest, traits).non_embedding
    if budget < smallest_count:
        raise UsageError(
            f"target {target_text!r} allows {budget:,} non-embedding parameters; the smallest this model "
            f"can reach is {smallest_count:,} ({smallest_count / full_count:.3%})"
        )
    fitting: list[Shape] = []
    for step in HIDDEN_STEPS:
        if not fitting and (step <= full.hidden_size // 16 or step == HIDDEN_STEPS[-1]):
            fitting = [s for s in _candidates(full, traits, budget, step) if _allowed(s, full, shape)]
    if not fitting:
        raise UsageError(
            f"target {target_text!r}: no shape of this model has between {budget * 99 // 100 + 1:,} and "
            f"{budget:,} non-embedding parameters; try a slightly larger target"
        )
    if int8:
        fitting = [found for found in fitting if shape_loads_in_int8(found)] or fitting
    ideal_layers = max(full.num_layers * (budget / full_count) ** DEPTH_SHARE, min(2, full.num_layers))
    final = min(fitting, key=lambda shape: (_cost(shape, full, ideal_layers), _order(shape)))
    staged = list(_shapes(full, final, cuts))
    return Plan(
        target_text=target_text.strip(),
        budget=budget,
        full=full,
        cuts=tuple(made for made, _ in staged),
        stages=tuple(after for _, after in staged),
        traits=traits,
        full_vocab_size=traits.vocab_size,
    )


def shape_after(cut: str, before: Shape, final: Shape) -> Shape:
    """Return the shape once `cut` was made on the way from `before` to `final`."""
    changed = {
        "width": ("hidden_size", "num_heads", "num_kv_heads"),
        "mlp": ("intermediate_size",),
        "halving": ("num_layers",),
        "depth": ("num_layers",),
    }[cut]
    return replace(before, **{name: getattr(final, name) for name in changed})


def halvings(layers: int, final: int) -> Iterator[int]:
    """Yield how many layers each halving leaves on the way to the final number, which is not among them."""
    half = math.ceil(layers / 2)
    while half > max(final, SHALLOW):
        yield half
        half = math.ceil(half / 2)


def _shapes(
    full: Shape, final: Shape, cuts: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], Shape]]:
    """Yield what each stage cuts and the shape it leaves."""
    shape = full
    for stage in cuts:
        if stage == ("halving",):
            for layers in halvings(shape.num_layers, final.num_layers):
                shape = replace(shape, num_layers=layers)
                yield stage, shape
            continue
        for cut in stage:
            shape = shape_after(cut, shape, final)
        yield stage, shape if stage else final


def _allowed(candidate: Shape, full: Shape, shape: str) -> bool:
    if shape == "width":
        return candidate.num_layers == full.num_layers
    return shape == "all" or candidate.hidden_size == full.hidden_size


def _smallest(full: Shape) -> Shape:
    return Shape(
        num_layers=1,
        hidden_size=min(SMALLEST_HIDDEN, full.hidden_size),
        num_heads=1,
        num_kv_heads=1,
        head_dim=full.head_dim,
        intermediate_size=min(SMALLEST_MLP, full.intermediate_size),
    )


def _candidates(full: Shape, traits: Traits, budget: int, hidden_step: int) -> Iterator[Shape]:
    """Yield the shapes within the budget and 1 % of it, the MLP taking up what the rest leaves."""
    for hidden in _hidden_sizes(full.hidden_size, hidden_step):
        for kv_heads in range(1, full.num_kv_heads + 1):
            for group in range(1, full.heads_per_group + 1):
                if traits.heads_must_divide_hidden() and hidden % (kv_heads * group):
                    continue
                for layers in range(1, full.num_layers + 1):
                    shape = Shape(layers, hidden, kv_heads * group, kv_heads, full.head_dim, 0)
                    width = _mlp_width(shape, full, traits, budget)
                    if width:
                        yield replace(shape, intermediate_size=width)


def _hidden_sizes(full: int, step: int) -> list[int]:
    return [*range(max(step, SMALLEST_HIDDEN), full, step), full]


def _mlp_width(shape: Shape, full: Shape, traits: Traits, budget: int) -> int | None:
    """Return the roundest MLP width that lands within 1 % below the budget, None where none does."""
    base = count_parameters(shape, traits).non_embedding
    per_neuron = count_parameters(replace(shape, intermediate_size=1), traits).non_embedding - base
    most = min((budget - base) // per_neuron, full.intermediate_size)
    if most < min(SMALLEST_MLP, full.intermediate_size):
        return None
    for multiple in (64, 32, 16, 8, 4, 2, 1):
        width = most // multiple * multiple
        if (base + width * per_neuron) * 100 > 99 * budget:
            return width
    return None


def _cost(shape: Shape, full: Shape, ideal_layers: float) -> float:
    """Return how far a shape is from what one wants, in squared log-ratios."""
    hidden = shape.hidden_size
    mlp = shape.intermediate_size / hidden
    attention = shape.attention_width / hidden
    wanted_mlp = min(max(full.intermediate_size / full.hidden_size, 1.5), 2.75)
    wanted_attention = min(max(full.attention_width / full.hidden_size, 0.75), 2.0)
    cost = math.log(shape.num_layers / ideal_layers) ** 2
    cost += 0.5 * math.log(mlp / wanted_mlp) ** 2
    cost += 0.5 * math.log(attention / wanted_attention) ** 2
    cost += 0.05 * math.log(shape.heads_per_group / full.heads_per_group) ** 2
    for beyond in (1.5 / mlp, mlp / 4, 0.75 / attention):
        cost += 2 * max(math.log(beyond), 0.0) ** 2
    # Fewer dimensions tell too few items apart, and one layer cannot compose what another found.
    cost += 20 * max(math.log(min(LEAST_HIDDEN, full.hidden_size) / hidden), 0.0) ** 2
    cost += 4 * max(math.log(min(2, full.num_layers) / shape.num_layers), 0.0) ** 2
    return cost + _roughness(hidden, 0.03) + _roughness(shape.intermediate_size, 0.01)


def _roughness(size: int, weight: float) -> float:
    """Return a price for a size that is no multiple of 64: kernels waste part of their last tile."""
    missing = sum(size % multiple != 0 for multiple in (64, 32, 16))
    return weight * (missing + 10 * (size % 8 != 0))


def _order(shape: Shape) -> tuple[int, ...]:
    return (-shape.num_layers, -shape.hidden_size, -shape.num_heads, -shape.num_kv_heads)
