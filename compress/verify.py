"""Does the written checkpoint hold what was planned, and does stock vLLM read it as transformers does?"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from compress.apart import run_apart
from models.checkpoint import weight_files
from models.errors import LeanRecError
from models.families import ParameterCounts, count_tensors

PROMPTS = 32
NEW_TOKENS = 16


@dataclass(frozen=True)
class Tolerance:
    """How far two right implementations may be apart, in log-probability of a token."""

    difference: float
    tie: float
    """Two tokens closer than this may change places."""


FP32 = Tolerance(difference=5e-3, tie=1e-4)
INT8 = Tolerance(difference=0.5, tie=0.5)
"""The engines round activations by scales that differ by 1/255, so each makes rounding errors of its own:
some hundredths in all, and vLLM's bf16 as much again. A scale or a matrix read wrongly makes whole units."""


@dataclass(frozen=True)
class Weights:
    """What the safetensors headers of a checkpoint say."""

    counts: ParameterCounts
    bytes: int
    """on disk"""


@dataclass(frozen=True)
class Parity:
    """transformers against vLLM, both fp32; of int8 checkpoints vLLM in bf16."""

    engine: str
    prompts: int
    greedy_equal: bool
    max_abs_logprob_diff: float


def read_weights(directory: Path) -> Weights:
    """Return the parameters and bytes of a checkpoint, counted from its safetensors headers alone."""
    shapes: dict[str, list[int]] = {}
    files = weight_files(directory)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not name.endswith(".weight_scale"):  # of int8 weights: bytes, but no parameters
                    shapes[name] = tensors.get_slice(name).get_shape()
    return Weights(count_tensors(shapes), sum(file.stat().st_size for file in files))


def check_parameters(directory: Path, planned: ParameterCounts) -> Weights:
    """Return the recounted weights of a checkpoint.

    Raises:
        LeanRecError: a part holds another number of parameters than planned.
    """
    weights = read_weights(directory)
    different = [
        f"{part} {getattr(weights.counts, part):,} in the file, {getattr(planned, part):,} planned"
        for part in ("embedding", "head", "attention", "mlp", "norm")
        if getattr(weights.counts, part) != getattr(planned, part)
    ]
    if different:
        raise LeanRecError(f"{directory}: parameters differ from the plan: {'; '.join(different)}")
    return weights


def check_vllm_installed() -> None:
    """Raise LeanRecError if vLLM is missing; asked before the work, not after it."""
    if importlib.util.find_spec("vllm") is None:
        raise LeanRecError(
            "vllm: not installed, and compress verifies its result in it; install leanrec[cpu], or "
            "leanrec[gpu] on a machine with a GPU"
        )


def check_engines_agree(
    directory: Path, prompts: Sequence[Sequence[int]], tolerance: Tolerance = FP32
) -> Parity:
    """Return how transformers and vLLM compare on greedy continuations of the prompts.

    Each prompt is continued by `NEW_TOKENS` greedy tokens in vLLM; transformers then scores the same
    tokens in one forward pass, so its greedy tokens are the same if each is its own first choice.

    Raises:
        LeanRecError: vLLM cannot run the checkpoint, or a token or a log-probability differs by more than
            the tolerance.
    """
    tokens, logprobs = _greedy_in_vllm(directory, prompts)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    differences, wrong = [], []
    for number, (prompt, continued, theirs) in enumerate(zip(prompts, tokens, logprobs, strict=True)):
        ids = torch.tensor([[*prompt, *continued]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(continued) + 1).logits[0, :-1]
        ours = torch.log_softmax(logits.float(), -1)
        chosen = ours[torch.arange(len(continued)), torch.tensor(continued)]
        differences.append((chosen - torch.tensor(theirs)).abs().max())
        behind = ours.max(-1).values - chosen
        if float(behind.max()) > tolerance.tie:
            step = int((behind > tolerance.tie).nonzero()[0])
            best = int(ours[step].argmax())
            wrong.append(f"prompt {number}, token {step}: vLLM {continued[step]}, transformers {best}")
    worst = float(torch.stack(differences).max())  # unlike Python's max, it keeps a NaN
    parity = Parity("vllm", len(prompts), not wrong, worst)
    if wrong:
        raise LeanRecError(
            f"{directory}: vLLM and transformers choose other greedy tokens on {len(wrong)} of "
            f"{len(prompts)} prompts ({wrong[0]}; largest log-probability difference {worst:.2g})"
        )
    if not worst <= tolerance.difference:
        raise LeanRecError(
            f"{directory}: log-probabilities of vLLM and transformers differ by up to {worst:.2g} "
            f"(allowed {tolerance.difference:g})"
        )
    return parity


def _greedy_in_vllm(
    directory: Path, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    check_vllm_installed()
    request = {
        "directory": str(directory.resolve()),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "new_tokens": NEW_TOKENS,
    }
    answer = run_apart("compress.vllm_greedy:generate", request, directory)
    return answer["tokens"], answer["logprobs"]
