"""Greedy tokens of a checkpoint in stock vLLM, in fp32, or bf16 where it is int8: run by `verify`, apart."""

import json
import os
from pathlib import Path

from models import vllm_plugin

KV_CACHE_BYTES = 256 * 2**20


def generate(directory: str, prompts: list[list[int]], new_tokens: int) -> dict[str, list]:
    """Return for each prompt the greedy tokens and their log-probabilities over the whole vocabulary."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_PLUGINS"] = vllm_plugin.NAME
    # Attention in fp32 is Triton's on a GPU, which would multiply in TF32.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from models.vllm_model import platform_dtype

    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    is_quantized = bool(config.get("quantization_config"))
    engine = LLM(
        model=directory,
        skip_tokenizer_init=True,
        # vLLM's int8 kernel for CPUs with AMX takes no fp32.
        dtype=("bfloat16" if current_platform.is_cpu() else platform_dtype()) if is_quantized else "float32",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + new_tokens,
        max_num_seqs=16,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=0.05,  # has to be free, beside `compress` itself
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    reply: dict[str, list] = {"tokens": [], "logprobs": []}
    for output in outputs:
        completion = output.outputs[0]
        reply["tokens"].append(list(completion.token_ids))
        reply["logprobs"].append(
            [row[token].logprob for token, row in zip(completion.token_ids, completion.logprobs, strict=True)]
        )
    return reply


def preload() -> None:
    """Import what every request needs."""
    from models.vllm_model import preload_vllm

    preload_vllm()
