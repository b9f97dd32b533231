"""The optimizer of long restorations: what a step does to a matrix, to the rest, and after a resume."""

import copy
import math

import pytest
import torch

from compress.muon import ADAM_SIZE, FASTER, MuonWithAdamW, orthogonal
from tests.tiny import tiny_model

RATE, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)


@pytest.fixture
def model():
    """A model of two layers with gradients."""
    made = tiny_model("qwen2", 96, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    give_gradients(made, seed=0)
    return made


def give_gradients(model, seed):
    draws = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=draws)


def optimizer_of(model):
    return MuonWithAdamW(model, rate=RATE, weight_decay=DECAY, betas=BETAS, products=torch.float32)


@pytest.mark.parametrize("shape", [(3, 40, 64), (3, 64, 40), (2, 48, 48)])
def test_a_direction_has_the_same_singular_vectors_and_values_near_one(shape):
    draws = torch.Generator().manual_seed(1)
    matrices = torch.randn(shape, generator=draws)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    # Values three orders of magnitude apart, as gradients have them.
    matrices = left * torch.logspace(0, -3, values.shape[1]) @ right
    inner = left.transpose(1, 2) @ orthogonal(matrices) @ right.transpose(1, 2)
    found = torch.diagonal(inner, dim1=1, dim2=2)
    assert (inner - torch.diag_embed(found)).abs().max() < 1e-3
    large = values.shape[1] // 2  # the smallest are not all the way up after so few iterations
    assert found[:, :large].min() > 0.5
    assert found.max() < 1.3


def test_a_step_moves_matrices_by_muon_and_the_rest_by_adamw(model):
    before = copy.deepcopy(model)
    by_adamw = copy.deepcopy(model)
    for weight, other in zip(by_adamw.parameters(), model.parameters(), strict=True):
        weight.grad = other.grad.clone()
    optimizer_of(model).step()
    decays = [weight for weight in by_adamw.parameters() if weight.ndim == 2]
    others = [weight for weight in by_adamw.parameters() if weight.ndim < 2]
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, betas=BETAS).step()

    rate = FASTER * RATE
    adams = dict(by_adamw.named_parameters())
    olds = dict(before.named_parameters())
    seen = {"muon": 0, "adamw": 0}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
            size = rate * ADAM_SIZE * math.sqrt(max(weight.shape))
            wanted = olds[name] * (1 - rate * DECAY) - size * orthogonal(weight.grad[None])[0]
            seen["muon"] += 1
        else:
            wanted = adams[name]
            seen["adamw"] += 1
        torch.testing.assert_close(weight, wanted, msg=name)
    assert seen["muon"] == 14
    assert seen["adamw"] >= 6


def test_the_next_step_goes_on_from_the_momentum(model):
    matrix = model.model.layers[1].self_attn.o_proj.weight
    optimizer = optimizer_of(model)
    first = matrix.grad.clone()
    optimizer.step()
    before = matrix.detach().clone()
    give_gradients(model, seed=1)
    optimizer.step()
    momentum = 0.95 * 0.05 * first + 0.05 * matrix.grad
    direction = orthogonal((0.05 * matrix.grad + 0.95 * momentum)[None])[0]
    size = FASTER * RATE * ADAM_SIZE * math.sqrt(max(matrix.shape))
    torch.testing.assert_close(matrix, before * (1 - FASTER * RATE * DECAY) - size * direction)


def test_a_matrix_without_a_gradient_stays(model):
    still = model.model.layers[0].mlp.up_proj.weight
    still.grad, before = None, still.detach().clone()
    optimizer_of(model).step()
    assert torch.equal(still, before)


def test_saved_and_loaded_it_goes_on_to_the_same_weights(model):
    first = optimizer_of(model)
    first.step()
    other = copy.deepcopy(model)
    second = optimizer_of(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for trained, optimizer in ((model, first), (other, second)):
        give_gradients(trained, seed=1)
        optimizer.step()
    for weight, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)


def test_a_schedule_sets_both_rates(model):
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [FASTER * RATE / 2, RATE / 2, RATE / 2]
