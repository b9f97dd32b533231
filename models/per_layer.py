"""Layers that differ: how many heads and neurons each has, read from config.json's `per_layer_config`.

The format is transformers' own: one entry for each layer that differs from the values at the top, with
`skip` naming the halves (`attention`, `mlp`) it lacks. A half that is skipped has no norm either.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MODEL_TYPE = "leanrec"
ARCHITECTURE = "LeanRecForCausalLM"
VARYING = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class LayerShape:
    """One layer. Without attention it has 0 heads, without MLP a width of 0."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class PerLayerShape:
    """The dimensions of a model whose layers differ."""

    hidden_size: int
    head_dim: int
    layers: tuple[LayerShape, ...]

    @staticmethod
    def of(config: Mapping[str, Any]) -> "PerLayerShape":
        """Return the shape that the object in config.json says.

        Raises:
            KeyError, TypeError, ValueError: it says none.
        """
        overrides = {int(index): values for index, values in (config.get("per_layer_config") or {}).items()}
        layers = []
        for index in range(int(config["num_hidden_layers"])):
            differs = overrides.get(index, {})
            heads, kv_heads, width = (int(differs.get(name, config[name])) for name in VARYING)
            skipped = differs.get("skip", ())
            if "attention" in skipped:
                heads = kv_heads = 0
            layers.append(LayerShape(heads, kv_heads, 0 if "mlp" in skipped else width))
        return PerLayerShape(int(config["hidden_size"]), int(config["head_dim"]), tuple(layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_heads(self) -> int:
        """KV heads of all layers together: what a token takes in the KV cache."""
        return sum(layer.num_kv_heads for layer in self.layers)

    def config_values(self) -> dict[str, Any]:
        """Return the keys of config.json that say this shape."""
        # At the top stand sizes that go together: layers without attention are given them by readers.
        widest = max(self.layers, key=lambda layer: (layer.num_heads, layer.num_kv_heads))
        top = (widest.num_heads, widest.num_kv_heads, max(layer.intermediate_size for layer in self.layers))
        per_layer: dict[int, dict[str, Any]] = {}
        for index, layer in enumerate(self.layers):
            values: dict[str, Any] = {}
            if layer.num_heads:
                values |= dict(zip(VARYING[:2], (layer.num_heads, layer.num_kv_heads), strict=True))
            if layer.intermediate_size:
                values[VARYING[2]] = layer.intermediate_size
            skipped = [name for name, size in _halves(layer) if not size]
            per_layer[index] = values | ({"skip": skipped} if skipped else {})
        return {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            **dict(zip(VARYING, top, strict=True)),
            "per_layer_config": per_layer,
        }

    def largest(self) -> dict[str, int]:
        """Return the layers' number and the largest of each size, under the names of `families.Shape`."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": max(layer.num_heads for layer in self.layers),
            "num_kv_heads": max(layer.num_kv_heads for layer in self.layers),
            "head_dim": self.head_dim,
            "intermediate_size": max(layer.intermediate_size for layer in self.layers),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the largest sizes, and under `layers` those of each layer."""
        return {**self.largest(), "layers": [asdict(layer) for layer in self.layers]}


def _halves(layer: LayerShape) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("attention", layer.num_heads), ("mlp", layer.intermediate_size)
