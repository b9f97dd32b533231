"""Pruned weights before a long restoration: small as new ones, mixed with those, and one seed decides."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compress.rebuild import fresh_model
from compress.shrink_perturb import _fold_norms, shrink_and_perturb
from models.per_layer import LayerShape, PerLayerShape
from models.per_layer_model import per_layer_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "tie_word_embeddings": True,
}


def trained(config, seed=5):
    """Return a model whose weights are far from new: of every size, norms and biases too."""
    torch.manual_seed(seed)
    family = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    model = family(config).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.mul_(1.5 ** (n % 7 - 3)).add_(0.01 * n * torch.randn_like(parameter))
    return model


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def answers(model):
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


def test_with_everything_kept_only_the_sizes_change():
    old, model = trained(LlamaConfig(**SIZES)), trained(LlamaConfig(**SIZES))
    shrink_and_perturb(model, keep=1.0, seed=0)
    fresh = linears(fresh_model(model.config, 0))
    for name, module in linears(model.model.layers).items():
        drawn = fresh[f"model.layers.{name}"].weight
        assert module.weight.std().item() == pytest.approx(drawn.std().item(), rel=1e-3), name
    for was, layer in zip(old.model.layers, model.model.layers, strict=True):
        read = was.self_attn.q_proj.weight * was.input_layernorm.weight
        for before, after in (
            (read, layer.self_attn.q_proj.weight),
            (was.mlp.down_proj.weight, layer.mlp.down_proj.weight),
        ):
            assert torch.cosine_similarity(before.flatten(), after.flatten(), 0) > 0.9999
        assert (layer.input_layernorm.weight == 1).all()
        assert (layer.post_attention_layernorm.weight == 1).all()
    for same in ("embed_tokens.weight", "norm.weight"):
        assert torch.equal(model.model.get_parameter(same), old.model.get_parameter(same))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_mostly_one_direction_becomes_as_small_as_new_and_equally_wide(tied):
    config = LlamaConfig(**{**SIZES, "vocab_size": 300, "tie_word_embeddings": tied})
    old, model = trained(config), trained(config)
    with torch.no_grad():
        for made in (old, model):
            made.get_input_embeddings().weight.mul_(torch.linspace(0.1, 9, 48)).add_(1.5)
    shrink_and_perturb(model, keep=0.5, seed=0)
    before, after = (made.get_input_embeddings().weight.detach().double() for made in (old, model))
    fresh = fresh_model(config, 0).get_input_embeddings().weight.std().item()
    assert after.std().item() == pytest.approx(fresh, rel=1e-3)
    assert after.mean(0).abs().max() < 1e-6
    widths = torch.linalg.eigvalsh(after.T @ after)
    assert (widths[-1] / widths[0]).item() == pytest.approx(1, rel=1e-3)
    # The nearest such table: what is left to get from one to the other turns nothing.
    stretch = (before - before.mean(0)).T @ after
    torch.testing.assert_close(stretch, stretch.T, rtol=1e-3, atol=1e-3)
    assert (torch.linalg.eigvalsh(stretch) > 0).all()
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (model.model.norm.weight == 1).all()
    else:  # a head of its own, and the norm it reads, were in nobody's way
        assert torch.equal(model.lm_head.weight, old.lm_head.weight)
        assert torch.equal(model.model.norm.weight, old.model.norm.weight)


@pytest.mark.parametrize(("shared", "rewritten"), [(0.35, False), (0.45, True)])
def test_how_much_one_direction_holds_decides(shared, rewritten):
    config = LlamaConfig(**{**SIZES, "vocab_size": 300})
    model = trained(config)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(torch.linalg.qr(torch.randn(300, 48))[0])
        # Of 48 directions as wide as one another the first gets the share.
        table[:, 0].mul_((47 * shared / (1 - shared)) ** 0.5)
    before = table.clone()
    shrink_and_perturb(model, keep=0.5, seed=0)
    assert torch.equal(table, before) != rewritten


def test_a_direction_that_no_token_uses_stays_empty():
    model = trained(LlamaConfig(**{**SIZES, "vocab_size": 300}))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] = 100.0  # all alike: the mean row's alone
    shrink_and_perturb(model, keep=0.5, seed=0)
    table = model.get_input_embeddings().weight
    assert table[:, 7].abs().max() < 1e-6
    assert table.std() < 0.1
    assert table.isfinite().all()


def test_folding_the_norms_changes_no_answer():
    model = trained(LlamaConfig(**SIZES))
    before = answers(model)
    with torch.no_grad():
        for layer in model.model.layers:
            _fold_norms(layer)
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-4)


def test_what_is_not_kept_is_filled_up_with_new_weights():
    old, model = trained(LlamaConfig(**SIZES)), trained(LlamaConfig(**SIZES))
    shrink_and_perturb(model, keep=0.5, seed=3)
    name = "model.layers.1.mlp.down_proj"
    mixed, was, drawn = (
        linears(m)[name].weight.flatten() for m in (model, old, fresh_model(model.config, 3))
    )
    expected = 0.5 * was * drawn.std() / was.std() + 0.75**0.5 * drawn
    torch.testing.assert_close(mixed, expected)


def test_the_seed_decides_and_the_global_generator_does_not():
    def made(seed, disturb):
        model = trained(LlamaConfig(**SIZES))
        torch.manual_seed(disturb)
        shrink_and_perturb(model, keep=0.5, seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(made(0, 1), made(0, 2))
    assert not torch.equal(made(0, 1), made(1, 1))


def test_biases_shrink_with_their_matrices():
    old = trained(Qwen2Config(**SIZES))
    model = trained(Qwen2Config(**SIZES))
    shrink_and_perturb(model, keep=0.5, seed=0)
    before, after = (m.model.layers[0].self_attn for m in (old, model))
    scale = after.k_proj.bias / before.k_proj.bias
    assert scale.std() < 1e-4
    assert (after.k_proj.bias != 0).all()
    folded = before.k_proj.weight * old.model.layers[0].input_layernorm.weight
    drawn = linears(fresh_model(model.config, 0))["model.layers.0.self_attn.k_proj"].weight
    assert scale[0].item() == pytest.approx((0.5 * drawn.std() / folded.std()).item(), rel=1e-4)


def test_layers_may_lack_a_half():
    shape = PerLayerShape(48, 12, (LayerShape(4, 2, 0), LayerShape(0, 0, 80)))
    config = per_layer_config(LlamaConfig(**SIZES), shape)
    model = fresh_model(config, 1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(9)
    shrink_and_perturb(model, keep=0.5, seed=0)
    for name, module in linears(model.model.layers).items():
        assert module.weight.std() < 0.04, name
    assert answers(model).isfinite().all()
