"""History in, token ids out: the only place where a prompt is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from models.errors import LeanRecError
from models.line_tokens import encode_by_lines, line_feed
from models.template import compile_template
from models.title_tokens import TitleTokens
from models.word_tokens import cuts_before_spaces, encode_by_words

STREAM_TEMPLATE = "{% for title in history %}{{ title }}\n{% endfor %}"
"""A plain stream: one title a line, oldest first."""
TOKENISED_AT_ONCE = 1 << 16
"""Titles: a batch is held as Python objects until it is in flat arrays."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a history becomes text."""

    template: str = STREAM_TEMPLATE
    """A sandboxed Jinja2 text; `history` is the list of titles, oldest first."""
    separator: str = "\n"
    """Ends every title, in the catalogue and in what the model generates."""
    max_history: int = 20
    """Titles kept, the newest."""

    def __post_init__(self) -> None:
        if not self.separator:
            raise LeanRecError('prompt.separator: is empty; titles need an end marker, for example "\\n"')
        if self.max_history < 1:
            raise LeanRecError(f"prompt.max_history: {self.max_history} is not a positive number")

    @property
    def is_stream(self) -> bool:
        return self.template == STREAM_TEMPLATE and self.separator == "\n"

    @property
    def truncation_chunk(self) -> int:
        """Titles dropped at a time: a window that slid by one would change every cached prefix."""
        return max(1, self.max_history // 4)


class Prompter:
    """Encodes histories of catalogue rows.

    In the stream format the prompt is the start token and the titles' own tokens one after another, so no
    title is tokenised twice. Any other template is rendered and tokenised whole.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: PromptConfig,
        titles: Sequence[str],
        title_tokens: Callable[[], TitleTokens] | None = None,
    ) -> None:
        """Args:
        title_tokens: Gives the titles' tokens where they are known; else they are tokenised when needed.
        """
        self.tokenizer = tokenizer
        self.config = config
        self.titles = titles
        self._title_tokens = title_tokens
        if getattr(tokenizer, "is_fast", False):
            _forget_last_batch(tokenizer.backend_tokenizer)
        try:
            self._template = compile_template(config.template)
            self._template.render(history=["a", "b"])
        except Exception as error:  # a template's own faults too, as a division by zero
            raise LeanRecError(f"prompt.template: not a valid template ({error})") from error

    @cached_property
    def start_tokens(self) -> list[int]:
        """What precedes a stream's first title: the start token, or the separator where there is none."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None else self._ids(self.config.separator)

    @cached_property
    def title_tokens(self) -> TitleTokens:
        """Tokens of each catalogue row's title, end marker included."""
        return self._title_tokens() if self._title_tokens else self.encode_titles(self.titles)

    def encode_titles(self, titles: Sequence[str]) -> TitleTokens:
        """Return each title's tokens as they follow a prompt, end marker included.

        Raises:
            LeanRecError: of some title the tokenizer leaves nothing but the end marker.
        """
        encoded = self._encoded_titles(titles)
        marker = self._ids(self.config.separator)
        short = np.flatnonzero(encoded.lengths <= len(marker)).tolist()
        nothing = [titles[row] for row in short if encoded[row] in ([], marker)]
        if nothing:
            raise LeanRecError(
                f"catalogue: {len(nothing)} titles have no tokens in this tokenizer (first: "
                f"{', '.join(map(repr, nothing[:3]))}); use a tokenizer that knows their script, "
                "or leave the items out"
            )
        return encoded

    def _encoded_titles(self, titles: Sequence[str]) -> TitleTokens:
        if not self.config.is_stream:
            before = self._template.render(history=["\x00"]).rpartition("\x00")[2]
            following = self._encode(titles, before).without(self._ids(before))
            if following is not None:
                return following
        return self._encode(titles)

    def _encode(self, titles: Sequence[str], before: str = "") -> TitleTokens:
        encode = self._encode_fast if getattr(self.tokenizer, "is_fast", False) else self._encode_slowly
        parts = [
            encode([before + title + self.config.separator for title in titles[at : at + TOKENISED_AT_ONCE]])
            for at in range(0, len(titles), TOKENISED_AT_ONCE)
        ]
        return TitleTokens.concatenate(parts) if parts else TitleTokens.of([])

    def _encode_slowly(self, texts: list[str]) -> TitleTokens:
        return TitleTokens.of(self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _encode_fast(self, texts: list[str]) -> TitleTokens:
        """The same without offsets and masks, in half the time; less where words or lines are told apart."""
        backend = self.tokenizer.backend_tokenizer

        def encode(texts: list[str]) -> TitleTokens:
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
            return TitleTokens.of([encoding.ids for encoding in encoded])

        if cuts_before_spaces(backend):
            return encode_by_words(texts, encode)
        feed = line_feed(backend)
        return encode(texts) if feed is None else encode_by_lines(texts, encode, feed)

    def kept(self, history: Sequence[int]) -> Sequence[int]:
        """Return the newest part of a history that fits `max_history`, cut in whole chunks."""
        chunk = self.config.truncation_chunk
        excess = len(history) - self.config.max_history
        return history if excess <= 0 else history[-(-excess // chunk) * chunk :]

    def encode(self, history: Sequence[int]) -> list[int]:
        """Return the prompt's token ids for a history of catalogue rows, oldest first."""
        rows = self.kept(history)
        if self.config.is_stream:
            tokens = list(self.start_tokens)
            for row in rows:
                tokens += self.title_tokens[row]
            return tokens
        text = self._template.render(history=[self.titles[row] for row in rows])
        tokens = list(self.tokenizer(text)["input_ids"])
        if not tokens:
            raise LeanRecError("prompt.template: renders to an empty prompt")
        return tokens

    def encode_within(self, history: Sequence[int], longest: int) -> list[int]:
        """Return the prompt of as many of a history's newest titles as fit `longest` tokens, dropped in whole
        chunks; where not even one does, the end of its prompt."""
        kept = self.kept(history)
        while len(prompt := self.encode(kept)) > longest and len(kept) > 1:
            kept = kept[min(self.config.truncation_chunk, len(kept) - 1) :]
        return prompt[-longest:]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _forget_last_batch(tokenizer: Any) -> None:
    """Undo truncation and padding: a tokenizer's file keeps those of the last batch before it was saved.

    Nothing is written where there are none: another thread may be encoding with the same tokenizer.
    """
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        tokenizer.no_padding()
