"""A new model from a config and the tensors that pruning left."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.families import Shape, resized_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rebuild(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a model in evaluation mode that holds copies of the tensors, on their device.

    A Qwen2 that became a Llama gets the o_proj bias it lacked, zero.
    """
    state = dict(tensors)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    reference = state[EMBEDDING]
    if getattr(config, "attention_bias", False):
        for layer in range(config.num_hidden_layers):
            bias = f"model.layers.{layer}.self_attn.o_proj.bias"
            state.setdefault(bias, reference.new_zeros(config.hidden_size))
    with torch.random.fork_rng():  # random initial weights are made and thrown away
        model = AutoModelForCausalLM.from_config(
            config, dtype=reference.dtype, attn_implementation=config._attn_implementation
        )
    model.load_state_dict(state)
    return model.to(reference.device).eval()


def random_model(config: PretrainedConfig, shape: Shape, seed: int) -> PreTrainedModel:
    """Return a model of another shape with fresh weights: what pruning is held against."""
    return fresh_model(resized_config(config, shape), seed)


def fresh_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model in evaluation mode with fresh weights, fp32 on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=config._attn_implementation
        )
    return model.eval()
