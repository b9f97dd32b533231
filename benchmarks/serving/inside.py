"""vLLM's worker, for benchmarks that look inside it."""

from typing import Any

from models.vllm_engine import WorkerEngine


def worker_of(engine: Any) -> Any:
    """Return the worker that an engine searches in.

    Raises:
        RuntimeError: the engine does not search inside a worker.
    """
    if not isinstance(engine, WorkerEngine):
        raise RuntimeError("the search does not run inside the worker here")
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
