"""A compression whose figures are made up."""

from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import LlamaConfig

from compress.achieved import Achieved
from compress.plan import make_plan
from compress.report import Evidence
from compress.verify import Parity, Weights
from models.metrics import paired

PLAN = make_plan(
    LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        intermediate_size=256,
        vocab_size=512,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    "20%",
)


def on_test_users(ndcg: float) -> dict[str, Any]:
    values = {"hr@5": 0.1, "hr@10": 0.2, "ndcg@5": ndcg / 2, "ndcg@10": ndcg}
    return {**values, "users": 60, "ci95": {key: [value * 0.9, value * 1.1] for key, value in values.items()}}


def make_evidence() -> Evidence:
    """Return what a compression in three stages may find."""
    curve = [{"tokens": 100 * n, "nll": 5.0 - n / 10, "kl": 1.0 - n / 10} for n in range(6)]
    losses = [
        {"tokens": 100 * n, "loss": 1.0, "kl_valid": 1.0 / (n + 1), "kl_vocabulary": 0.1} for n in range(1, 6)
    ]
    restored = {"seconds": 20.0, "best": 4, "curve": curve, "losses": losses, "tokens": 500}
    width = {
        "name": "width",
        "importances": {"query_heads": [[1.0, 2.0, 0.5, 3.0]] * 4, "kv_groups": [[3.0, 3.5]] * 4},
        "kept": {"query_heads": [[0, 1]] * 4, "kv_groups": [[0]] * 4},
        "dropped_layers": [],
    }
    tried = {"layers": [[-1.0, 0.2, 0.1, 0.3]]}
    depth = {"name": "depth", "importances": tried, "kept": {}, "dropped_layers": [2]}
    none = {"name": "mlp", "importances": {}, "kept": {}, "dropped_layers": []}
    return Evidence(
        plan=PLAN,
        achieved=Achieved(PLAN.counts, asdict(PLAN.final)),
        weights=(Weights(PLAN.counts[0], 4000), Weights(PLAN.counts[-1], 800)),
        read_seconds=11.0,
        full={"seconds": 5.0, "metrics": {"nll": 4.0}},
        cuts=[{"seconds": 10.0, "surgery": [s]} for s in (width, none, depth)],
        restored=[restored] * 3,
        tests={
            "full": on_test_users(0.1),
            "pruned": on_test_users(0.09),
            "baselines": {"popularity": on_test_users(0.03), "bigram": on_test_users(0.05)},
        },
        compared=paired(np.array([1, 0, 2, 3]), np.array([2, 0, 2, 0])),
        each_user_once=None,
        parity=Parity("vllm", 32, True, 2e-6),
        seed=0,
        versions={"torch": "2"},
        finishing_seconds=7.0,
        peak_memory_bytes=123 * 2**20,
    )
