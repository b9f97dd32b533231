"""vLLM's `LLM` in this process: how it is configured, loaded, measured and closed."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models import vllm_plugin
from models.checkpoint import Recommender, read_safetensors_header
from models.engine import CPU_BLOCK_SIZE, CPU_KV_CACHE_BYTES, GPU_BLOCK_SIZE, GPU_KV_CACHE_BYTES
from models.errors import LeanRecError
from models.precision import check_int8_products, served_dtype

# Separate processes would each import vLLM again; other plugins and telemetry are not asked for.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_PLUGINS": vllm_plugin.NAME,
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
    # A long prompt's attention in parts, one a thread, rounds otherwise than beside other prompts.
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    # In fp32 attention is Triton's on a GPU, which would multiply in TF32.
    "TRITON_F32_DEFAULT": "ieee",
}

logger = logging.getLogger(__name__)


def prepare_environment() -> None:
    """Set what vLLM reads while it is imported."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Importing says much about Triton and torch before vLLM reads its own level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def import_vllm() -> Any:
    """Return the module `vllm`, with all that `LLM` needs imported.

    Raises:
        LeanRecError: vLLM is not installed.
    """
    prepare_environment()
    try:
        import vllm

        _ = vllm.LLM  # imported when it is first named
    except ImportError as error:
        raise LeanRecError(
            f"vllm: cannot be imported ({error}); install the extra `leanrec[cpu]` or `leanrec[gpu]`"
        ) from error
    return vllm


def preload_vllm() -> None:
    """Import vLLM for processes that are going to be forked; how it is configured is left to them."""
    before = {name: os.environ.get(name) for name in (*_ENVIRONMENT, *_DEFAULT_ENVIRONMENT)}
    import_vllm()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def load_llm(recommender: Recommender, arguments: Mapping[str, Any]) -> Any:
    """Return vLLM's `LLM` for a recommender, as a model that gives hidden states.

    Args:
        arguments: vLLM engine arguments by field name; they take precedence over what is chosen here.

    Raises:
        LeanRecError: vLLM is not installed, or refuses the model or an argument; the model is int8, and the
            CPU gets it wrong.
    """
    vllm = import_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and getattr(recommender.config, "quantization_config", None):
        check_int8_products(str(recommender.directory))
    try:
        return vllm.LLM(**(engine_choices(recommender) | dict(arguments)))
    except Exception as error:  # whatever vLLM's layers raise: it is about the model or an argument
        logger.debug("vLLM failed to load", exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LeanRecError(f"{recommender.directory}: vLLM cannot load it: {reason[:500]}") from error


def engine_choices(recommender: Recommender) -> dict[str, Any]:
    """Return the engine arguments that are chosen where none are given."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    return {
        "model": str(recommender.directory),
        "runner": "pooling",
        "convert": "embed",
        "dtype": platform_dtype(),
        "max_model_len": recommender.longest,
        "enforce_eager": on_cpu,
        "block_size": CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES if on_cpu else GPU_KV_CACHE_BYTES,
        # As the KV cache has its own size, this only says how much has to be free: others may be there too.
        **({} if on_cpu else {"gpu_memory_utilization": 0.05}),
        "max_num_seqs": 256 if on_cpu else 1024,
        "use_tqdm_on_load": False,
        "seed": 0,
    }


def platform_dtype() -> str:
    """Return the precision that serves where none is asked for: GPUs before Ampere have no bf16."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not current_platform.has_device_capability(80):
        return "float16"
    return served_dtype("cpu" if current_platform.is_cpu() else "cuda")


def checkpoint_tensors(recommender: Recommender) -> Callable[[str], torch.Tensor | None]:
    """Return what reads a tensor of the checkpoint by name, in its own precision; None if it has none."""
    from safetensors import safe_open

    directory = recommender.directory
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
    else:
        files = dict.fromkeys(read_safetensors_header(directory / "model.safetensors"), "model.safetensors")

    def read(name: str) -> torch.Tensor | None:
        if name not in files:
            return None
        with safe_open(directory / Path(files[name]).name, framework="pt") as file:
            return file.get_tensor(name)

    return read


def read_head_weight(recommender: Recommender) -> torch.Tensor:
    """Return the language-model head's weight `[vocabulary, hidden]`, in the checkpoint's own precision.

    Raises:
        LeanRecError: the checkpoint has none.
    """
    name = "model.embed_tokens.weight" if recommender.config.tie_word_embeddings else "lm_head.weight"
    weight = checkpoint_tensors(recommender)(name)
    if weight is None:
        raise LeanRecError(f"{recommender.directory}: the weights hold no {name}")
    return weight


def max_length(llm: Any) -> int:
    """Return the most tokens of prompt and title together."""
    return int(llm.llm_engine.vllm_config.model_config.max_model_len)


def kv_cache_bytes(llm: Any) -> int:
    """Return the size of the KV cache."""
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes)


def release_process_groups() -> None:
    """Destroy the groups through which vLLM's processes would talk: there is one process.

    Each has a thread that wakes a hundred times a second; a dozen cost an idle service 1 to 2 % of a core.
    """
    import torch.distributed
    from vllm.distributed import parallel_state

    for reference in list(parallel_state._groups.values()):
        coordinator = reference()
        for name in ("device_group", "cpu_group"):
            # Without the attribute vLLM's own clean-up passes the group over.
            if hasattr(coordinator, name):
                torch.distributed.destroy_process_group(getattr(coordinator, name))
                delattr(coordinator, name)


def close_llm(llm: Any) -> None:
    """Release the model, the KV cache and vLLM's process-wide state, so that another can be loaded."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
