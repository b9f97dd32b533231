"""One forward of vLLM's model over sequences that we lay out in its KV cache ourselves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
    groups = [group for groups in model_runner.attn_groups for group in groups]
    if len(model_runner.kv_cache_config.kv_cache_groups) != 1 or len(groups) != 1:
        return f"the layers need {len(groups)} KV cache groups"
    group, spec = groups[0], groups[0].kv_cache_spec
    num_blocks = model_runner.kv_cache_config.num_blocks
    caches = layer_caches(model_runner).values()
    reasons = {
        f"the attention is {type(spec).__name__}": type(spec) is not FullAttentionSpec,
        "the attention is windowed": (spec.sliding_window or spec.attention_chunk_size) is not None,
        "the attention kernel splits the KV blocks": group.kernel_block_size is not None,
        "the KV cache is not laid out block by block": any(cache.shape[0] != num_blocks for cache in caches),
    }
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
        self._group = model_runner.attn_groups[0][0]
        self._caches = list({c.data_ptr(): c for c in layer_caches(model_runner).values()}.values())
        self.device = model_runner.device
        self.block_size: int = self._group.kv_cache_spec.block_size
        self.num_blocks: int = self._caches[0].shape[0]
        self.max_length: int = self._config.model_config.max_model_len
        self.max_tokens = max_tokens
        self._max_queries: int = self._config.scheduler_config.max_num_seqs

    def fits(self, queries: int, tokens: int) -> bool:
        """Whether so much goes into one forward."""
        return queries <= self._max_queries and tokens <= self.max_tokens

    def run(self, queries: Sequence[Query]) -> torch.Tensor:
        """Write the queries' KV and return the wanted hidden states, after the last norm, `[wanted, hidden]`.

        A query may read blocks that another query of the same call fills.
        """
        lengths = np.fromiter((len(q.tokens) for q in queries), np.int32, len(queries))
        starts = np.fromiter((q.start for q in queries), np.int32, len(queries))
        ends = np.cumsum(lengths, dtype=np.int32)
        owners = np.repeat(np.arange(len(queries)), lengths)
        positions = np.arange(ends[-1]) - (ends - lengths - starts)[owners]
        num_blocks = np.fromiter((len(q.blocks) for q in queries), np.int32, len(queries))
        flat = itertools.chain.from_iterable(q.blocks for q in queries)
        table = np.zeros((len(queries), num_blocks.max()), np.int32)
        table[np.arange(table.shape[1]) < num_blocks[:, None]] = np.fromiter(flat, np.int32, num_blocks.sum())
        blocks = table[owners, positions // self.block_size].astype(np.int64)
        slots = self._tensor(blocks * self.block_size + positions % self.block_size)
        places = self._tensor(positions.astype(np.int64))
        boundaries = torch.from_numpy(np.concatenate([np.zeros(1, np.int32), ends]))
        totals = torch.from_numpy(starts + lengths)
        metadata = self._group.build_metadata(
            self._common_metadata(
                query_start_loc=boundaries.to(self.device),
                query_start_loc_cpu=boundaries,
                seq_lens=totals.to(self.device),
                seq_lens_cpu_upper_bound=totals,
                num_reqs=len(queries),
                num_actual_tokens=int(ends[-1]),
                max_query_len=int(lengths.max()),
                max_seq_len=int(totals.max()),
                block_table_tensor=self._tensor(table),
                slot_mapping=slots,
                positions=places,
                causal=True,
            )
        )
        layers = self._group.layer_names
        with self._set_forward_context(
            dict.fromkeys(layers, metadata),
            self._config,
            num_tokens=int(ends[-1]),
            slot_mapping=dict.fromkeys(layers, slots),
        ):
            hidden = self._model(
                input_ids=self._tensor(np.concatenate([q.tokens for q in queries])),
                positions=places,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        first = (ends - lengths).tolist()
        rows = [
            begin + offset for begin, query in zip(first, queries, strict=True) for offset in query.wanted
        ]
        return hidden[self._tensor(np.array(rows, np.int64))]

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole KV blocks in every layer."""
        if not sources:
            return
        source = self._tensor(np.array(sources, np.int64))
        target = self._tensor(np.array(targets, np.int64))
        for cache in self._caches:
            cache[target] = cache[source]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
