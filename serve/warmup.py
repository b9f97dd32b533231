"""Proof before readiness: the engine must give the golden answer."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np

from models.checkpoint import Recommender
from models.engine import Engine
from models.errors import LeanRecError
from models.golden import FILE, Golden, golden_prompt, read_golden
from models.search import SearchRequest
from models.subset import Subset

TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.3}
"""Most a title's log-probability may differ from transformers' in fp32. A wrong weight, token or position
moves it by whole units; rounding to bf16 moves it by some hundredths."""

logger = logging.getLogger(__name__)


class GoldenSource:
    """The golden answer of a directory: stored, or computed in a process of its own while vLLM loads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stored = read_golden(directory)
        self._process: subprocess.Popen[str] | None = None
        if self._stored is None:
            logger.info("%s: no %s; computing the golden answer with transformers", directory, FILE)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "models.golden", str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def get(self) -> Golden:
        """Return the golden answer, waiting for it where it is being computed.

        Raises:
            LeanRecError: it cannot be computed.
        """
        if self._stored is not None:
            return self._stored
        assert self._process is not None
        output, errors = self._process.communicate()
        if self._process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise LeanRecError(f"{self._directory}: the golden answer cannot be computed: {last}")
        return Golden.parse(output, "models.golden")

    def close(self) -> None:
        """Stop a computation nobody waits for any more."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def warm_up(
    engine: Engine, recommender: Recommender, golden: Golden, dtype: str, *, batch: int, max_length: int
) -> None:
    """Run the engine over its range and compare one answer with the golden one.

    Args:
        max_length: Most tokens of prompt and title together.

    Raises:
        LeanRecError: the tokenizer or the engine gives something else than transformers did.
    """
    history, prompt, digest = golden_prompt(recommender)
    if (history, digest) != (golden.history, golden.prompt_sha256):
        raise LeanRecError(
            f"{recommender.directory}: the golden answer is for another catalogue, prompt or tokenizer; "
            f"if they were changed on purpose, delete {FILE}"
        )
    row_of = recommender.catalog.row_of
    if unknown := [item for item in golden.items if item not in row_of]:
        raise LeanRecError(f"{recommender.directory}: the golden answer has unknown items ({unknown[0]!r})")
    # Asked for exactly the golden items: near-ties may change places, scores may not change.
    rows = [row_of[item] for item in golden.items]
    wanted = np.zeros(len(row_of), bool)
    wanted[rows] = True
    request = SearchRequest(prompt=prompt, k=len(rows), subset=Subset.of(recommender.trie, wanted))
    result = engine.recommend([request])[0]
    found = dict(zip(result.rows, result.scores, strict=True))
    scores = np.array([found.get(row, np.nan) for row in rows])
    difference = float(np.abs(scores - np.array(golden.scores)).max())
    if not difference <= TOLERANCE[dtype]:
        raise LeanRecError(
            f"{recommender.directory}: the engine's answer to the golden request differs from transformers' "
            f"by {difference:.3f} in log-probability (tolerance {TOLERANCE[dtype]} in {dtype}); the weights "
            f"were loaded wrongly, or {FILE} belongs to other weights: delete it then"
        )
    logger.info("golden answer confirmed: log-probabilities differ by at most %.4f", difference)
    longest = recommender.prompter.encode(list(range(len(row_of)))[-recommender.prompt.max_history :])
    longest = longest[-(max_length - recommender.trie.deepest) :]  # as those of clients are cut
    engine.recommend([SearchRequest(prompt=longest, k=min(100, len(row_of)))])
    engine.recommend([SearchRequest(prompt=longest[: -(-len(longest) // (i + 1))]) for i in range(batch)])
