"""Made-up findings of every kind of compression."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from transformers import LlamaConfig

from compress.achieved import Achieved
from compress.plan import THREE_CUTS, Plan, make_plan
from compress.report import Evidence, Quantized
from compress.verify import Parity, Weights
from models.metrics import paired
from tests.browser.hostile import HOSTILE
from tests.compress.made_up import make_evidence


def plan_of(layers: int, heads: int, **options: Any) -> Plan:
    """Return a plan for a model of 64 numbers a head."""
    config = LlamaConfig(
        hidden_size=64 * heads,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        num_hidden_layers=layers,
        intermediate_size=1536,
        vocab_size=49152,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return make_plan(config, "5%", **options)


def scores(ndcg: float) -> dict[str, Any]:
    """Return made-up metrics of 300 test users."""
    values = {"hr@5": 1.2 * ndcg, "hr@10": 2.05 * ndcg, "ndcg@5": 0.75 * ndcg, "ndcg@10": ndcg}
    intervals = {name: [0.83 * value, 1.18 * value] for name, value in values.items()}
    return {**values, "users": 300, "ci95": intervals}


def evidence_of(plan: Plan) -> Evidence:
    """Return made-up findings of a compression of some size, in any number of stages."""
    rng = np.random.default_rng(0)
    layers, heads, groups = plan.full.num_layers, plan.full.num_heads, plan.full.num_kv_heads
    width = {
        "name": "width",
        "importances": {
            "query_heads": rng.gamma(2, 1, (layers, heads)).tolist(),
            "kv_groups": rng.gamma(2, 1, (layers, groups)).tolist(),
        },
        "kept": {"query_heads": [[0, 2]] * layers, "kv_groups": [[0]] * layers},
        "dropped_layers": [],
    }

    def depth(before: int) -> dict[str, Any]:
        tried = {"layers": [[-1.0, *rng.gamma(2, 0.02, before - 1).tolist()]]}
        gone = list(range(2, before - 2))
        return {"name": "depth", "importances": tried, "kept": {}, "dropped_layers": gone}

    mlp = {"name": "mlp", "importances": {}, "kept": {}, "dropped_layers": []}
    befores = [shape.num_layers for shape in (plan.full, *plan.stages)]
    told_of = {"width": width, "mlp": mlp}
    surgery = [
        [told_of.get(cut) or depth(before) for cut in made]
        for made, before in zip(plan.cuts, befores, strict=False)
    ]
    cuts, restored = [], []
    for number, told in enumerate(surgery):
        start, tokens = 6.4 - 0.2 * number, 500_000 * (number + 1)
        steps = np.linspace(0, 1, 9)
        left = [float(np.exp(-4 * x)) for x in steps]
        curve = [
            {"tokens": tokens * x, "nll": 5.8 + (start - 5.8) * share, "kl": share}
            for x, share in zip(steps, left, strict=True)
        ]
        losses = [
            {"tokens": tokens * x, "kl_valid": 0.04 + 0.4 * float(np.exp(-6 * x))}
            for x in np.linspace(0.02, 1, 60)
        ]
        cuts.append({"seconds": 12.0, "surgery": told})
        restored.append({"seconds": 55.0, "best": 8, "curve": curve, "losses": losses, "tokens": tokens})
    ranks = rng.integers(0, 40, (2, 300)) % 31
    tests = {"full": scores(0.0614), "pruned": scores(0.0598)}
    tests["baselines"] = {"popularity": scores(0.0224), "bigram": scores(0.0519)}
    weights = (
        Weights(plan.counts[0], 4 * plan.counts[0].total),
        Weights(plan.counts[-1], 4 * plan.counts[-1].total),
    )
    return replace(
        make_evidence(),
        plan=plan,
        achieved=Achieved(plan.counts, asdict(plan.final)),
        weights=weights,
        cuts=cuts,
        restored=restored,
        full={"seconds": 5.0, "metrics": {"nll": 5.81}},
        tests=tests,
        compared=paired(ranks[0], np.where(rng.random(300) < 0.9, ranks[0], ranks[1])),
    )


def quantized() -> Evidence:
    """Return findings of a compression that ended with an int8 checkpoint."""
    evidence = make_evidence()
    scores = evidence.tests["pruned"]
    told = Quantized(
        scheme="w8a8",
        bytes_before=1600,
        tests={"unquantized": scores, "quantized": scores | {"ndcg@10": 0.0894}},
        parity=Parity("vllm", 32, True, 0.031),
    )
    return replace(evidence, quantized=told)


def layers_that_differ() -> Evidence:
    """Return findings of a compression in the per-layer layout."""
    evidence = make_evidence()
    layers = [{"num_heads": n % 2, "num_kv_heads": n % 2, "intermediate_size": 64 * n} for n in range(3)]
    final = {**evidence.achieved.final, "layers": layers}
    return replace(evidence, achieved=Achieved(evidence.achieved.counts, final))


COMPRESSIONS: dict[str, Callable[[], Evidence]] = {
    "small": make_evidence,
    "middling": lambda: evidence_of(plan_of(12, 6, cuts=THREE_CUTS)),
    "large": lambda: evidence_of(plan_of(30, 9, cuts=THREE_CUTS)),
    "halved": lambda: evidence_of(plan_of(30, 9, cuts=(*THREE_CUTS[:2], ("halving",), ("depth",)))),
    "one-stage": lambda: evidence_of(plan_of(12, 6, cuts=(("width", "mlp", "depth"),))),
    "quantized": quantized,
    "layers-that-differ": layers_that_differ,
    "hostile": lambda: replace(make_evidence(), versions={HOSTILE: HOSTILE}),
}
