"""Halves of layers, attention or MLP: what they weigh, which are left, and a model made of them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from compress.rebuild import rebuild
from models.families import Shape, Traits, count_parameters
from models.per_layer import LayerShape, PerLayerShape
from models.per_layer_model import per_layer_config

MODULES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


@dataclass(frozen=True, order=True)
class Half:
    """One half of a layer; they sort in the order in which the model runs them."""

    layer: int
    kind: str
    """`attention` or `mlp`"""


def halves_of(shape: PerLayerShape) -> list[Half]:
    """Return the halves a model of this shape has, in order."""
    found = []
    for n, layer in enumerate(shape.layers):
        found += [Half(n, "attention")] if layer.num_heads else []
        found += [Half(n, "mlp")] if layer.intermediate_size else []
    return found


def only(shape: PerLayerShape, kept: Iterable[Half]) -> PerLayerShape:
    """Return the shape with only these halves; layers are counted as before."""
    kept = set(kept)
    layers = []
    for n, layer in enumerate(shape.layers):
        attention, mlp = Half(n, "attention") in kept, Half(n, "mlp") in kept
        heads = (layer.num_heads, layer.num_kv_heads) if attention else (0, 0)
        layers.append(LayerShape(*heads, layer.intermediate_size if mlp else 0))
    return replace(shape, layers=tuple(layers))


def weight_of(half: Half, shape: PerLayerShape, traits: Traits) -> int:
    """Return the parameters of a half, its norm included."""
    none = only(shape, [])
    return (
        count_parameters(only(shape, [half]), traits).non_embedding
        - count_parameters(none, traits).non_embedding
    )


@contextmanager
def only_halves(model: PreTrainedModel, kept: Iterable[Half]) -> Iterator[None]:
    """Let the model skip its other halves."""
    kept = set(kept)
    removed = []
    for n, layer in enumerate(model.model.layers):
        for kind, (name, _) in MODULES.items():
            if Half(n, kind) not in kept and getattr(layer, name) is not None:
                removed.append((layer, name, getattr(layer, name)))
                setattr(layer, name, None)
    try:
        yield
    finally:
        for layer, name, module in removed:
            setattr(layer, name, module)


def assemble(model: PreTrainedModel, tensors: Mapping[str, Tensor], kept: Sequence[Half]) -> PreTrainedModel:
    """Return a model of the kept halves only, as wide as their tensors are.

    Layers left empty are gone, and an attention is joined by the MLP that follows it, whatever layers both
    were of: the same computation in fewer layers.

    Args:
        model: whose config and generation config the result takes over.
        tensors: of all layers, by the model's names.
    """
    head_dim = Shape.of(model.config).head_dim
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    layers: list[LayerShape] = []
    for half in sorted(kept):
        source = f"model.layers.{half.layer}"
        if half.kind == "attention" or not layers or layers[-1].intermediate_size:
            layers.append(LayerShape(0, 0, 0))
        if half.kind == "attention":
            heads, kv_heads = (
                len(tensors[f"{source}.self_attn.{name}.weight"]) // head_dim for name in ("q_proj", "k_proj")
            )
            layers[-1] = LayerShape(heads, kv_heads, 0)
        else:
            layers[-1] = replace(layers[-1], intermediate_size=len(tensors[f"{source}.mlp.up_proj.weight"]))
        prefixes = tuple(f"{source}.{module}." for module in MODULES[half.kind])
        for name, tensor in tensors.items():
            if name.startswith(prefixes):
                state[f"model.layers.{len(layers) - 1}.{name.removeprefix(f'{source}.')}"] = tensor
    shape = PerLayerShape(model.config.hidden_size, head_dim, tuple(layers))
    made = rebuild(per_layer_config(model.config, shape), state)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made
