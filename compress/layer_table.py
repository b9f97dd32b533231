"""Layer by layer, where they differ: rows for the report."""

from typing import Any

HEAD = ["layer", "query heads", "KV heads", "MLP width"]


def layer_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return one row a layer of the pruned model; none where all are alike."""
    columns = ("num_heads", "num_kv_heads", "intermediate_size")
    return [
        [str(n), *(f"{layer[name]:,}" if layer[name] else "none" for name in columns)]
        for n, layer in enumerate(report["shape"]["pruned"].get("layers", ()))
    ]
