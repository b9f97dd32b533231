"""What the cuts came to: as planned in the uniform layout, read off the steps where layers differ."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compress.plan import Plan
from models.families import ParameterCounts, count_parameters
from models.per_layer import PerLayerShape


@dataclass(frozen=True)
class Achieved:
    """Parameters of the full model and after each stage, and the final shape."""

    counts: tuple[ParameterCounts, ...]
    final: dict[str, Any]
    """the keys of `families.Shape`, and `layers` where they differ"""


def achieved(plan: Plan, layout: str, steps: list[Path]) -> Achieved:
    """Return what the finished steps hold.

    Args:
        layout: `uniform` or `per-layer`.
        steps: the directory of each stage's finished step.
    """
    if layout == "uniform":
        return Achieved(plan.counts, asdict(plan.final))
    configs = [AutoConfig.from_pretrained(step, local_files_only=True) for step in steps]
    shapes = [PerLayerShape.of(config.to_dict()) for config in configs]
    counts = (count_parameters(shape, plan.traits) for shape in shapes)
    return Achieved((plan.counts[0], *counts), shapes[-1].to_json())
