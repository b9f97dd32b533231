"""An engine with next to no model: what a deployment takes whatever it serves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.deployment import Deployment
from loadtest.memory import Sample, read


@dataclass(frozen=True, kw_only=True)
class EmptyEngine:
    """Memory of all at one moment: pages of libraries that they share are counted to each in part."""

    sample: Sample
    weights_bytes: int
    above_bytes: Mapping[str, int]
    """what each deployment takes more than the empty engine, proportional set size, by its name"""


def make_empty(like: Path, directory: Path) -> Path:
    """Write a recommender of one very small layer with a recommender's catalogue and tokenizer."""
    import torch

    from models.checkpoint import read_recommender, write_recommender
    from models.presets import Preset, new_model

    recommender = read_recommender(like)
    torch.manual_seed(0)
    smallest = Preset(
        hidden_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=64,
        vocabulary=len(recommender.tokenizer),
        max_history=recommender.prompt.max_history,
    )
    model = new_model(smallest, recommender.tokenizer, recommender.config.max_position_embeddings)
    if isinstance(recommender.config.dtype, torch.dtype):
        model = model.to(recommender.config.dtype)
    write_recommender(
        directory,
        model=model.eval(),
        tokenizer=recommender.tokenizer,
        catalog=recommender.catalog,
        prompt=recommender.prompt,
        training=recommender.training,
    )
    return directory


def measure_empty(empty: Deployment, others: Iterable[Deployment]) -> EmptyEngine | None:
    """Return what the empty engine takes and what the others take above it; None where memory is not told.

    All are just ready: they have answered their golden prompts, and hardly touched their KV caches.
    """
    beside = [deployment for deployment in others if deployment.process is not None]
    samples = {d.name: read(d.process.pid) for d in (empty, *beside) if d.process is not None}
    sample = samples[empty.name]
    if sample is None:
        return None
    return EmptyEngine(
        sample=sample,
        weights_bytes=empty.model["weights_bytes"],
        above_bytes={
            deployment.name: found.pss_bytes - sample.pss_bytes
            for deployment in beside
            if (found := samples[deployment.name]) is not None
        },
    )
