"""From a recommender directory to an engine that can be served."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from models.checkpoint import read_recommender
from models.errors import LeanRecError, UsageError
from models.families import check_supported
from serve.batching import BatchLimits
from serve.service import BYTES, Loaded
from serve.warmup import GoldenSource

CHOSEN_HERE = ("model", "runner", "convert", "worker_extension_cls", "trust_remote_code", "tokenizer")
"""Engine arguments that the service is built on, or that would run code from the checkpoint."""


def load_in_vllm(directory: Path, vllm_arguments: Sequence[str]) -> Loaded:
    """Read a recommender directory and load it in vLLM.

    Raises:
        UsageError: an argument vLLM does not know or the service cannot let go.
        LeanRecError: the directory is not a sound recommender, or vLLM refuses it.
    """
    with _everything_stays():
        return _load(directory, vllm_arguments)


@contextmanager
def _everything_stays() -> Iterator[None]:
    """Collect no garbage while modules are imported and the engine is made: a million objects, all to stay.

    Collections would walk them many times over, a fifth of the whole start, and later ones would stop the
    event loop.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load(directory: Path, vllm_arguments: Sequence[str]) -> Loaded:
    recommender = read_recommender(directory)
    check_supported(recommender.config, str(directory), served=True, per_layer=True)
    golden = GoldenSource(directory)
    # Slow to import, and not needed where the directory is not sound.
    from models.vllm_engine import open_engine
    from models.vllm_model import import_vllm

    try:
        import_vllm()
        arguments = parse_engine_arguments(vllm_arguments)
        gc.collect()
        gc.freeze()  # vLLM collects garbage several times while it starts
        engine = open_engine(recommender, arguments=arguments)
        config = engine.llm.llm_engine.vllm_config
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        if dtype not in BYTES:
            raise LeanRecError(f"--dtype {dtype}: is not served; use one of {', '.join(BYTES)}")
        on_cpu = config.device_config.device_type == "cpu"
        from vllm import __version__

        return Loaded(
            recommender=recommender,
            engine=engine,
            kind=engine.name,
            dtype=dtype,
            max_length=engine.max_length,
            kv_cache_bytes=engine.kv_cache_bytes,
            vllm=__version__,
            golden=golden.get,
            served_name=(arguments.get("served_model_name") or [None])[0],
            limits=BatchLimits() if on_cpu else BatchLimits(requests=64, tokens=32_768),
        )
    except BaseException:
        golden.close()
        raise


def parse_engine_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the vLLM engine arguments that were given, by field name.

    Raises:
        UsageError: an argument vLLM does not know, a bad value, or one the service sets itself.
    """
    if not arguments:
        return {}
    from models.vllm_model import prepare_environment

    prepare_environment()
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; `serve --help` has the options beside vLLM's engine arguments")

    parser = EngineArgs.add_cli_args(Parser(prog="serve", add_help=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that only what was given is returned
    try:
        given = parser.parse_args(list(arguments))
    except ValueError as error:
        raise UsageError(str(error)) from error
    values = vars(given)
    for name in CHOSEN_HERE:
        if name in values:
            raise UsageError(f"--{name.replace('_', '-')}: is set by serve itself and cannot be given")
    return values
