"""A recommender on the transformers engine, ready to be served."""

from models.checkpoint import Recommender, load_model
from models.golden import compute_golden
from models.transformers_engine import TransformersEngine
from serve.batching import BatchLimits
from serve.service import Loaded, Service


def load(recommender: Recommender) -> Loaded:
    """Return what a service is made of."""
    model = load_model(recommender)
    return Loaded(
        recommender=recommender,
        engine=TransformersEngine(model, recommender.trie),
        kind="transformers",
        dtype="float32",
        max_length=256,
        kv_cache_bytes=0,
        vllm=None,
        golden=lambda: compute_golden(recommender, model),
        limits=BatchLimits(requests=4, waiting=16, longest_wait_s=60.0),
    )


class KeptOpen(Service):
    """A service whose engine outlives it: the session's tests share one."""

    async def stop(self) -> None:
        self._loaded = None
        await super().stop()
