"""What people do today: Hugging Face generate with a prefix constraint, and beams over vLLM's public API."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.checkpoint import Recommender, load_model
from models.precision import served_dtype

BEAMS = 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT = 10


@dataclass(frozen=True)
class Answer:
    """The best items, best first; None stands for a generated title that is not in the catalogue."""

    rows: list[int | None]
    exact: bool | None = None
    expansions: int | None = None
    scores: list[float] | None = None
    steps: int | None = None


def end_token(recommender: Recommender) -> int:
    """Return the token that ends every title."""
    ends = {tokens[-1] for tokens in map(list, recommender.prompter.title_tokens)}
    if len(ends) != 1:
        raise ValueError(f"{recommender.directory}: titles end with different tokens")
    return int(ends.pop())


class GenerateContender:
    """`transformers`: 20 beams, a prefix function over a trie of dictionaries, scores renormalised."""

    def __init__(self, recommender: Recommender) -> None:
        self._model = load_model(recommender, getattr(torch, served_dtype(DEVICE)), DEVICE).eval()
        self._end = end_token(recommender)
        self._rows: dict[tuple[int, ...], int] = {}
        self._trie: dict[int, Any] = {}
        for row in np.argsort(recommender.trie.item_order)[::-1].tolist():
            tokens = [int(token) for token in recommender.prompter.title_tokens[row]]
            self._rows[tuple(tokens)] = row  # the most popular of a title comes last
            node = self._trie
            for token in tokens:
                node = node.setdefault(token, {})
        self._longest = max(map(len, self._rows))

    def takes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many of those that wait make the next batch."""
        return min(8, len(prompts))

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Generate for one batch, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

        def allowed(_: int, tokens: torch.Tensor) -> list[int]:
            node = self._trie
            for token in tokens[width:].tolist():
                node = node.get(token, {})
            return list(node) or [self._end]

        generated = self._model.generate(
            input_ids=ids.to(DEVICE),
            attention_mask=mask.to(DEVICE),
            num_beams=BEAMS,
            num_return_sequences=KEPT,
            max_new_tokens=self._longest,
            prefix_allowed_tokens_fn=allowed,
            renormalize_logits=True,
            length_penalty=0.0,
            do_sample=False,
            eos_token_id=self._end,
            pad_token_id=self._end,
        )
        titles = [self._title(row) for row in generated[:, width:].tolist()]
        rows = [self._rows.get(title) for title in titles]
        return [Answer(rows[i : i + KEPT]) for i in range(0, len(rows), KEPT)]

    def _title(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(tokens[: tokens.index(self._end) + 1] if self._end in tokens else tokens)


class BeamSearchContender:
    """vLLM's `LLM.beam_search` with 20 beams: it knows no catalogue."""

    def __init__(self, recommender: Recommender, llm: Any) -> None:
        from vllm.sampling_params import BeamSearchParams

        self._llm = llm
        end = end_token(recommender)
        llm.get_tokenizer().eos_token = llm.get_tokenizer().convert_ids_to_tokens(end)
        titles = [tuple(map(int, tokens)) for tokens in recommender.prompter.title_tokens]
        self._rows = {title[:-1]: row for row, title in enumerate(titles)}
        self._end = end
        self._parameters = BeamSearchParams(beam_width=BEAMS, max_tokens=max(map(len, titles)))

    def takes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many of those that wait make the next batch: vLLM schedules them itself."""
        return len(prompts)

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Generate for one batch."""
        outputs = self._llm.beam_search([{"prompt_token_ids": list(p)} for p in prompts], self._parameters)
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            titles = [self._title(beam.tokens[len(prompt) :]) for beam in output.sequences[:KEPT]]
            answers.append(Answer([self._rows.get(title) for title in titles]))
        return answers

    def _title(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(tokens[: tokens.index(self._end)] if self._end in tokens else tokens)


class AsyncLoopContender:
    """A straightforward constrained beam loop on `AsyncLLM`: one request a beam and step.

    It skips forced tokens and lets vLLM's prefix cache keep what beams share; without either it is
    several times slower still.
    """

    def __init__(self, recommender: Recommender, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._trie = recommender.trie
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    model=str(recommender.directory),
                    max_logprobs=-1,
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    **arguments,
                )
            )

        self._engine = self._loop.run_until_complete(start())

    def closed_loop(self, prompts: Sequence[Sequence[int]], clients: int) -> tuple[list[Answer], list[float]]:
        """Answer all prompts, `clients` at a time; return answers and latencies in seconds."""
        return self._loop.run_until_complete(self._closed_loop(prompts, clients))

    async def _closed_loop(
        self, prompts: Sequence[Sequence[int]], clients: int
    ) -> tuple[list[Answer], list[float]]:
        answers: list[Answer | None] = [None] * len(prompts)
        latencies = [0.0] * len(prompts)
        left = iter(range(len(prompts)))

        async def client() -> None:
            for index in left:
                begun = time.perf_counter()
                answers[index] = await self._answer(prompts[index])
                latencies[index] = time.perf_counter() - begun

        await asyncio.gather(*(client() for _ in range(clients)))
        return [answer for answer in answers if answer is not None], latencies

    async def _answer(self, prompt: Sequence[int]) -> Answer:
        trie = self._trie
        beams: list[tuple[float, int]] = [(0.0, 0)]  # a target: a node, or a leaf as ~leaf
        while any(target >= 0 for _, target in beams):
            nodes = [(score, target) for score, target in beams if target >= 0]
            scored = await asyncio.gather(
                *(self._children([*prompt, *trie.path(n).tolist()], n) for _, n in nodes)
            )
            beams = [beam for beam in beams if beam[1] < 0]
            for (score, _), children in zip(nodes, scored, strict=True):
                beams += [(score + log_prob, target) for log_prob, target in children]
            beams = sorted(beams, reverse=True)[:BEAMS]
        rows: list[int | None] = []
        for _, target in beams:
            start, stop = trie.leaf_item_offsets[~target : ~target + 2]
            rows += trie.leaf_items[start:stop].tolist()
        return Answer(rows[:KEPT])

    async def _children(self, tokens: list[int], node: int) -> list[tuple[float, int]]:
        from vllm import SamplingParams

        ids, targets = self._trie.children(node)
        parameters = SamplingParams(
            max_tokens=1, temperature=1.0, allowed_token_ids=ids.tolist(), logprobs=len(ids), detokenize=False
        )
        output = None
        async for latest in self._engine.generate(
            {"prompt_token_ids": tokens}, parameters, str(next(self._numbers))
        ):
            output = latest
        assert output is not None
        found = output.outputs[0].logprobs[0]
        return [(found[t].logprob, target) for t, target in zip(ids.tolist(), targets.tolist(), strict=True)]
