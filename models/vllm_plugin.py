"""LeanRec's plugin for vLLM: checkpoints whose layers differ load wherever LeanRec is installed.

vLLM finds it by the entry point `leanrec` of the group `vllm.general_plugins` and calls it in each of its
processes, in some more than once.
"""

from models.per_layer import ARCHITECTURE

NAME = "leanrec"
"""Of the entry point; `VLLM_PLUGINS` names it where only chosen plugins are loaded."""


def register() -> None:
    """Make vLLM, and transformers in the same process, know the architecture."""
    from vllm import ModelRegistry

    import models.per_layer_model  # noqa: F401 - tells transformers' Auto classes of it

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: vLLM imports the class when it is needed, so that a fork finds CUDA untouched.
        ModelRegistry.register_model(ARCHITECTURE, "models.vllm_per_layer:LeanRecForCausalLM")
