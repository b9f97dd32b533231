"""One forward of vLLM's model over sequences that we lay out in its KV cache ourselves."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from models import vllm_fused
from models.vllm_attention import Sequences
from models.vllm_fused import FusedModel
from models.vllm_graphs import ForwardGraphs, Inputs

LARGEST_ERROR = 0.1
"""Share of a hidden state by which faster layers may differ: bf16 rounding makes about 0.01, a mistake 1."""
LARGEST_INT8_ERROR = 0.3
"""The same where activations are rounded to int8: in SmolLM2's 30 layers that makes .12, by vLLM's own and by
the faster ones, which are .11 from one another."""
LARGEST_GRAPH = 2048
"""Rows of the largest forward that is captured: beyond, kernels take longer than their launch."""

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
        self._wide = [_in_words(cache) for cache in self._caches]
        self.device = model_runner.device
        self.block_size: int = self._groups[0].kv_cache_spec.block_size
        self.num_blocks: int = self._caches[0].shape[0]
        self.max_length: int = self._config.model_config.max_model_len
        self.max_tokens = max_tokens
        self._max_queries: int = self._config.scheduler_config.max_num_seqs
        self.fused: FusedModel | None = None
        """What runs in place of vLLM's own layers, if anything does"""
        self.graphs: ForwardGraphs | None = None
        """vLLM's own layers ready to be replayed, on a GPU"""

    def fits(self, queries: int, tokens: int) -> bool:
        """Whether so much goes into one forward."""
        return queries <= self._max_queries and tokens <= self.max_tokens

    def run(self, queries: Sequence[Query], copies: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
        """Write the queries' KV and return the wanted hidden states, after the last norm, `[wanted, hidden]`.

        A query may read blocks that another query of the same call fills.

        Args:
            copies: KV blocks and where they are copied first, whole, in every layer; no more than queries.
        """
        layout = _layout(queries, self.block_size)
        if self.graphs is not None:
            hidden = self.graphs(
                lambda inputs: layout.fill(inputs, copies),
                rows=len(layout.tokens),
                queries=len(queries),
                wanted=len(layout.wanted),
            )
            if hidden is not None:
                return hidden
        if copies:
            pairs = self._tensor(np.array(copies, np.int64))
            self._copy_blocks(pairs[:, 0], pairs[:, 1])
        if self.fused is not None:
            return self._fused_layers(self.fused, layout)
        tokens, positions = self._tensor(layout.tokens), self._tensor(layout.positions)
        metadata = self._metadata(layout.lengths, layout.totals, layout.table, layout.slots, positions)
        return self._own_layers(tokens, positions, metadata)[self._tensor(layout.wanted)]

    def _fused_layers(self, fused: FusedModel, layout: "_Layout") -> torch.Tensor:
        wanted = layout.wanted
        # Each wanted row as a sequence of its own: the last layer computes no other.
        lone = Sequences.of(
            np.ones(len(wanted), np.int32),
            (layout.positions[wanted] + 1).astype(np.int32),
            layout.table[layout.owners[wanted]],
        )
        sequences = Sequences.of(layout.lengths, layout.totals, layout.table)
        return fused(
            tokens=layout.tokens,
            positions=layout.positions,
            slots=layout.slots,
            sequences=sequences,
            wanted=wanted,
            lone=lone,
        )

    def _own_layers(self, tokens: torch.Tensor, positions: torch.Tensor, metadata: list[Any]) -> torch.Tensor:
        """Return the hidden states of all rows by vLLM's own layers."""
        by_layer = {
            name: of_group
            for group, of_group in zip(self._groups, metadata, strict=True)
            for name in group.layer_names
        }
        with self._set_forward_context(
            by_layer,
            self._config,
            num_tokens=len(tokens),
            slot_mapping=dict.fromkeys(by_layer, metadata[0].slot_mapping),
        ):
            hidden: torch.Tensor = self._model(
                input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        return hidden

    @torch.inference_mode()
    def capture(self) -> ForwardGraphs:
        """Return graphs of vLLM's own layers."""
        return ForwardGraphs(
            self._run_padded,
            device=self.device,
            most_rows=min(self.max_tokens, LARGEST_GRAPH),
            most_queries=self._max_queries,
            blocks=-(-self.max_length // self.block_size),
        )

    def _run_padded(self, inputs: Inputs) -> torch.Tensor:
        """Run a forward that lies on the device; queries without rows and rows without a query may end it."""
        self._copy_blocks(inputs.sources.long(), inputs.targets.long())
        positions = inputs.positions.long()
        common = self._common_metadata(
            query_start_loc=inputs.starts,
            # What is only known when a graph is replayed has no place on the host.
            query_start_loc_cpu=torch.zeros(len(inputs.starts), dtype=torch.int32),
            seq_lens=inputs.totals,
            seq_lens_cpu_upper_bound=torch.full((len(inputs.totals),), self.max_length, dtype=torch.int32),
            num_reqs=len(inputs.totals),
            num_actual_tokens=len(inputs.tokens),
            max_query_len=len(inputs.tokens),
            max_seq_len=self.max_length,
            block_table_tensor=inputs.table,
            slot_mapping=inputs.slots.long(),
            positions=positions,
            causal=True,
        )
        metadata = [group.build_metadata(common) for group in self._groups]
        return self._own_layers(inputs.tokens, positions, metadata)[inputs.wanted.long()]

    def _copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        for blocks in self._wide:
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))

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
            query_start_loc=boundaries.to(self.device, non_blocking=True),
            query_start_loc_cpu=boundaries,
            seq_lens=ends.to(self.device, non_blocking=True),
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
    if forward.device.type == "cuda":
        _open_graphs(forward, model_runner.vllm_config.model_config.get_vocab_size())
        return forward
    if reason := vllm_fused.obstacle(model_runner):
        logger.info("vLLM's own layers run: %s", reason)
        return forward
    try:
        fused = FusedModel(model_runner, tensors, max_tokens)
        error = _difference(forward, "fused", fused, model_runner.vllm_config.model_config.get_vocab_size())
    except (AttributeError, RuntimeError, TypeError) as failure:
        # Inner parts of another vLLM or PyTorch than was tested.
        logger.warning("vLLM's own layers run: the fused ones cannot (%s)", failure)
        forward.fused = None
        return forward
    if not error <= (LARGEST_INT8_ERROR if fused.is_int8 else LARGEST_ERROR):
        logger.warning("vLLM's own layers run: the fused ones differ by %.3f of a hidden state", error)
        forward.fused = None
    else:
        fused.take_over(model_runner)
    return forward


def _open_graphs(forward: PagedForward, vocabulary: int) -> None:
    """Let CUDA graphs run where they give what vLLM's layers give when they are called."""
    try:
        error = _difference(forward, "graphs", forward.capture(), vocabulary)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as failure:
        # Attention that reads its lengths on the host, or inner parts of another vLLM than was tested.
        logger.warning("the search runs without CUDA graphs, slower: they cannot be captured (%s)", failure)
        forward.graphs = None
        return
    if not error <= LARGEST_ERROR:
        logger.warning("the search runs without CUDA graphs, slower: they differ by %.3f", error)
        forward.graphs = None


@torch.inference_mode()
def _difference(
    forward: PagedForward, name: Literal["fused", "graphs"], faster: Any, vocabulary: int
) -> float:
    """Let `faster` run in place of vLLM's layers; return by how much its hidden states differ, as a share."""
    length = min(2 * forward.block_size + 3, forward.max_length)
    blocks = list(range(1, 2 + length // forward.block_size))
    tokens = np.random.default_rng(0).integers(vocabulary, size=length, dtype=np.int32)
    probe = [
        Query(tokens, 0, blocks, list(range(length))),
        Query(tokens[-2:], length - 2, blocks, [0, 1]),
    ]
    expected = forward.run(probe).float()
    setattr(forward, name, faster)
    return float((forward.run(probe).float() - expected).norm() / expected.norm())


def _in_words(cache: torch.Tensor) -> torch.Tensor:
    """Return a cache as `[blocks, words]`, which is copied several times faster than in bf16; as it is where
    a block is no piece of memory, in whatever order its dimensions lie there."""
    values = 1
    for stride, size in sorted(zip(cache.stride()[1:], cache.shape[1:], strict=True)):
        if size > 1 and stride != values:
            return cache
        values *= size
    if any(number * cache.element_size() % 8 for number in (values, cache.stride(0), cache.storage_offset())):
        return cache
    return cache.as_strided((len(cache), values), (cache.stride(0), 1)).view(torch.int64)


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

    def fill(self, inputs: Inputs, copies: Sequence[tuple[int, int]]) -> None:
        """Write it into arrays of zeros, which may be longer: block 0 takes what the rows beyond it write."""
        rows, queries = len(self.tokens), len(self.lengths)
        inputs.tokens[:rows] = self.tokens
        inputs.positions[:rows] = self.positions
        inputs.slots[:rows] = self.slots
        inputs.wanted[: len(self.wanted)] = self.wanted
        inputs.starts[1 : queries + 1] = np.cumsum(self.lengths)
        inputs.starts[queries + 1 :] = rows
        inputs.totals[:queries] = self.totals
        inputs.table[:queries, : self.table.shape[1]] = self.table
        if copies:
            inputs.sources[: len(copies)], inputs.targets[: len(copies)] = np.array(copies).T


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
