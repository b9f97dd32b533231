"""One forward of vLLM's model over sequences that we lay out in its KV cache ourselves."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models import vllm_fused
from models.vllm_fused import FusedModel

LARGEST_ERROR = 0.1
"""Share of a hidden state by which fused layers may differ: bf16 rounding makes about 0.01, a mistake 1."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """Tokens to run: positions `start` to `start + len(tokens)` of one sequence."""

    tokens: np.ndarray
    """int32 `[tokens]`"""
    start: int
    blocks: list[int]
    """KV blocks from the sequence's first position to its last"""
    wanted: list[int]
    """Offsets of the tokens whose hidden state is wanted"""


def layer_caches(model_runner: Any) -> dict[str, torch.Tensor]:
    """Return each attention layer's KV cache, `[blocks, ...]`."""
    context = model_runner.vllm_config.compilation_config.static_forward_context
    names = [name for groups in model_runner.attn_groups for group in groups for name in group.layer_names]
    return {name: context[name].kv_cache for name in names}


def obstacle(model_runner: Any) -> str | None:
    """Return why the forward cannot run on this model runner, or None if it can."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    needed = ("attn_groups", "kv_cache_config", "model", "vllm_config")
    if missing := [name for name in needed if not hasattr(model_runner, name)]:
        return f"the model runner has no {', '.join(missing)}"
    if (size := model_runner.vllm_config.parallel_config.world_size) != 1:
        return f"the model is spread over {size} devices"
    if (count := len(model_runner.kv_cache_config.kv_cache_groups)) != 1:
        return f"the layers need {count} KV cache groups"
    num_blocks = model_runner.kv_cache_config.num_blocks
    caches = layer_caches(model_runner).values()
    reasons = {
        "the KV cache is not laid out block by block": any(cache.shape[0] != num_blocks for cache in caches)
    }
    for group in model_runner.attn_groups[0]:
        spec = group.kv_cache_spec
        reasons |= {
            f"the attention is {type(spec).__name__}": type(spec) is not FullAttentionSpec,
            "the attention is windowed": (
                getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
            )
            is not None,
            "the attention kernel splits the KV blocks": group.kernel_block_size is not None,
        }
        if any(reasons.values()):
            break
    return next((reason for reason, holds in reasons.items() if holds), None)


class PagedForward:
    """Runs queries on a model runner whose blocks are all ours."""

    def __init__(self, model_runner: Any, max_tokens: int) -> None:
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        self._set_forward_context = set_forward_context
        self._common_metadata = CommonAttentionMetadata
        self._config = model_runner.vllm_config
        self._model = model_runner.model
        # Layers with other numbers of heads are groups of their own, on the same blocks.
        self._groups = model_runner.attn_groups[0]
        self._caches = list({c.data_ptr(): c for c in layer_caches(model_runner).values()}.values())
        self.device = model_runner.device
        self.block_size: int = self._groups[0].kv_cache_spec.block_size
        self.num_blocks: int = self._caches[0].shape[0]
        self.max_length: int = self._config.model_config.max_model_len
        self.max_tokens = max_tokens
        self._max_queries: int = self._config.scheduler_config.max_num_seqs
        self.fused: FusedModel | None = None
        """What runs in place of vLLM's own layers, if anything does"""

    def fits(self, queries: int, tokens: int) -> bool:
        """Whether so much goes into one forward."""
        return queries <= self._max_queries and tokens <= self.max_tokens

    def run(self, queries: Sequence[Query]) -> torch.Tensor:
        """Write the queries' KV and return the wanted hidden states, after the last norm, `[wanted, hidden]`.

        A query may read blocks that another query of the same call fills.
        """
        layout = _layout(queries, self.block_size)
        tokens, positions = self._tensor(layout.tokens), self._tensor(layout.positions)
        rows = self._tensor(layout.wanted)
        metadata = self._metadata(layout.lengths, layout.totals, layout.table, layout.slots, positions)
        if self.fused is not None:
            # Each wanted row as a query of its own: the last layer computes no other.
            owners = layout.owners[layout.wanted]
            ends = (layout.positions[layout.wanted] + 1).astype(np.int32)
            ones = np.ones(len(ends), np.int32)
            slots, table = layout.slots[layout.wanted], layout.table[owners]
            lone = self._metadata(ones, ends, table, slots, positions[rows]) if len(ends) else None
            return self.fused(tokens, positions, metadata, rows, lone)
        by_layer = {
            name: of_group
            for group, of_group in zip(self._groups, metadata, strict=True)
            for name in group.layer_names
        }
        with self._set_forward_context(
            by_layer,
            self._config,
            num_tokens=len(layout.tokens),
            slot_mapping=dict.fromkeys(by_layer, metadata[0].slot_mapping),
        ):
            hidden = self._model(
                input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        return hidden[rows]

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole KV blocks in every layer."""
        if not sources:
            return
        source = self._tensor(np.array(sources, np.int64))
        target = self._tensor(np.array(targets, np.int64))
        for cache in self._caches:
            cache[target] = cache[source]

    def _metadata(
        self,
        lengths: np.ndarray,
        totals: np.ndarray,
        table: np.ndarray,
        slots: np.ndarray,
        positions: torch.Tensor,
    ) -> list[Any]:
        """Return vLLM's attention metadata by group, for queries of `lengths` tokens that end at `totals`."""
        boundaries = torch.from_numpy(
            np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        )
        ends = torch.from_numpy(totals)
        common = self._common_metadata(
            query_start_loc=boundaries.to(self.device),
            query_start_loc_cpu=boundaries,
            seq_lens=ends.to(self.device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(lengths),
            num_actual_tokens=len(slots),
            max_query_len=int(lengths.max()),
            max_seq_len=int(totals.max()),
            block_table_tensor=self._tensor(table),
            slot_mapping=self._tensor(slots),
            positions=positions,
            causal=True,
        )
        return [group.build_metadata(common) for group in self._groups]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def open_forward(
    model_runner: Any, max_tokens: int, tensors: Callable[[str], torch.Tensor | None]
) -> PagedForward:
    """Return the forward with the fastest layers that give what vLLM's own give.

    Args:
        tensors: Reads a tensor of the checkpoint by name.
    """
    forward = PagedForward(model_runner, max_tokens)
    if reason := vllm_fused.obstacle(model_runner):
        logger.info("vLLM's own layers run: %s", reason)
        return forward
    try:
        fused = FusedModel(model_runner, tensors, max_tokens)
        error = _difference(forward, fused, model_runner.vllm_config.model_config.get_vocab_size())
    except (AttributeError, RuntimeError, TypeError) as failure:
        # Inner parts of another vLLM or PyTorch than was tested.
        logger.warning("vLLM's own layers run: the fused ones cannot (%s)", failure)
        forward.fused = None
        return forward
    if not error <= LARGEST_ERROR:
        logger.warning("vLLM's own layers run: the fused ones differ by %.3f of a hidden state", error)
        forward.fused = None
    else:
        fused.take_over(model_runner)
    return forward


@torch.inference_mode()
def _difference(forward: PagedForward, fused: FusedModel, vocabulary: int) -> float:
    """Let `fused` run in place of vLLM's layers; return by how much its hidden states differ, as a share."""
    length = min(2 * forward.block_size + 3, forward.max_length)
    blocks = list(range(1, 2 + length // forward.block_size))
    tokens = np.random.default_rng(0).integers(vocabulary, size=length, dtype=np.int32)
    probe = [Query(tokens, 0, blocks, list(range(length)))]
    expected = forward.run(probe).float()
    forward.fused = fused
    return float((forward.run(probe).float() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class _Layout:
    """Queries laid one after another."""

    tokens: np.ndarray
    """int32 `[rows]`"""
    positions: np.ndarray
    """int64 `[rows]`"""
    owners: np.ndarray
    """int64 `[rows]`: the query of each row"""
    lengths: np.ndarray
    """int32 `[queries]`"""
    totals: np.ndarray
    """int32 `[queries]`: positions up to each query's last"""
    table: np.ndarray
    """int32 `[queries, blocks]`"""
    slots: np.ndarray
    """int64 `[rows]`: where each row's keys and values go"""
    wanted: np.ndarray
    """int64 `[wanted]`: rows"""


def _layout(queries: Sequence[Query], block_size: int) -> _Layout:
    lengths = np.fromiter((len(q.tokens) for q in queries), np.int32, len(queries))
    starts = np.fromiter((q.start for q in queries), np.int32, len(queries))
    ends = np.cumsum(lengths)
    owners = np.repeat(np.arange(len(queries)), lengths)
    positions = np.arange(ends[-1]) - (ends - lengths - starts)[owners]
    num_blocks = np.fromiter((len(q.blocks) for q in queries), np.int32, len(queries))
    flat = itertools.chain.from_iterable(q.blocks for q in queries)
    table = np.zeros((len(queries), num_blocks.max()), np.int32)
    table[np.arange(table.shape[1]) < num_blocks[:, None]] = np.fromiter(flat, np.int32, num_blocks.sum())
    blocks = table[owners, positions // block_size].astype(np.int64)
    first = (ends - lengths).tolist()
    wanted = [begin + offset for begin, query in zip(first, queries, strict=True) for offset in query.wanted]
    return _Layout(
        tokens=np.concatenate([q.tokens for q in queries]),
        positions=positions,
        owners=owners,
        lengths=lengths,
        totals=starts + lengths,
        table=table,
        slots=blocks * block_size + positions % block_size,
        wanted=np.array(wanted, np.int64),
    )
