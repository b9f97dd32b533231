"""Which matrices every CPU's vLLM can hold in int8."""

from collections.abc import Iterator, Mapping, Sequence

from models.families import Shape

JOINED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's matrices as vLLM joins them"""


def loads_in_int8(outputs: int, inputs: int) -> bool:
    """Whether vLLM loads an int8 matrix of this shape on CPUs with AMX as well.

    There it takes a kernel of its own where inputs are a multiple of 32 and outputs of 16, which then fails
    ("Expected N == BLOCK_N") unless outputs are a multiple of 32. Seen with vLLM 0.32.
    """
    return inputs % 32 != 0 or outputs % 16 != 0 or outputs % 32 == 0


def shape_loads_in_int8(shape: Shape) -> bool:
    """Whether all matrices of a model's layers do."""
    attention = shape.num_heads * shape.head_dim
    joined = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return all(
        loads_in_int8(outputs, inputs)
        for outputs, inputs in ((joined, hidden), (hidden, attention), (2 * inner, hidden), (hidden, inner))
    )


def kept_in_full(shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Yield the modules that must not be int8, for matrices by name, `[out, in]` each."""
    for layer in {name.rsplit(".", 3)[0] for name in shapes if name.endswith("_proj.weight")}:
        for parts in JOINED:
            found = [f"{layer}.{part}" for part in parts if f"{layer}.{part}.weight" in shapes]
            sizes = [shapes[f"{name}.weight"] for name in found]
            if sizes and not loads_in_int8(sum(out for out, _ in sizes), sizes[0][1]):
                yield from found
