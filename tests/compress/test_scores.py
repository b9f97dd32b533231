"""Scores other than the default: against what their definition says, computed the plain way."""

import pytest
import torch

from compress import prunerec
from compress.distill import chunked_vocabulary_cross_entropy
from models.losses import ValidTokens, vocabulary_cross_entropy, vocabulary_kl


@pytest.fixture(scope="module")
def model(family_config, random_model):
    return random_model(family_config("llama-tied"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mask", "rtol"), [("llama-tied", prunerec.MASKED, 1e-3), ("qwen3", 0, 1e-2)]
)
def test_the_published_head_score_is_the_smoothed_kl_of_masking_it(
    *, family, mask, rtol, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    found = prunerec.width_scores(model, calibration_rows, ValidTokens(catalogue_trie))
    prompts = prunerec._prompts(calibration_rows)
    assert len(prompts) == prunerec.PROMPTS
    assert all(int(prompt.node_ids[0, -1]) == 0 for prompt in prompts), "each ends where a title begins"

    def last_logits():
        with torch.no_grad():
            return torch.stack([model(prompt.input_ids).logits[0, -1] for prompt in prompts])

    def masked(layer, head):
        weight = model.model.layers[layer].self_attn.q_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight[head * 32 : (head + 1) * 32] *= (
                mask  # Qwen3 makes small queries large again, and leaves none alone
            )
            after = last_logits()
            weight.copy_(before)
        return float(vocabulary_kl(last_logits(), after))

    own = torch.tensor([[masked(layer, head) for head in range(4)] for layer in (0, 1)])
    assert torch.allclose(found.heads[0].float(), own[0], rtol=rtol)
    assert torch.allclose(found.heads[1].float(), 0.7 * own[0] + 0.3 * own[1], rtol=rtol)
    assert found.channels.shape == (128,)
    assert (found.channels > 0).all()


def test_the_published_neuron_score_counts_places_among_the_largest(model, calibration_rows):
    kept = 5
    counts = prunerec.neuron_scores(model, calibration_rows, kept=kept)
    tokens = calibration_rows[0].input_ids.shape[1]
    assert counts.sum(1).tolist() == [kept * tokens] * 4
    seen = {}
    handle = model.model.layers[2].mlp.up_proj.register_forward_hook(
        lambda _module, _inputs, output: seen.update(up=output)
    )
    with torch.no_grad():
        model(calibration_rows[0].input_ids[:1])
    handle.remove()
    largest = seen["up"][0].argsort(dim=-1, descending=True)[:, :kept]
    assert torch.equal(counts[2].long(), torch.bincount(largest.flatten(), minlength=192))


def test_perplexity_reads_each_title_token_where_it_is_predicted(model, calibration_rows):
    batch = calibration_rows[1]
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    predicting = batch.title_mask[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1][predicting], batch.input_ids[:, 1:][predicting]
    )
    assert prunerec.perplexity(model, [batch]) == pytest.approx(float(expected.exp()), rel=1e-4)


def test_chunked_cross_entropy_has_the_value_and_gradients_of_the_plain_one(monkeypatch):
    from compress import distill

    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 50 * 7)
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    ids = torch.randint(0, 50, (23,))
    plain = vocabulary_cross_entropy(hidden, head, ids)
    ours = chunked_vocabulary_cross_entropy(hidden, head, ids)
    assert torch.allclose(plain, ours)
    pairs = zip(
        torch.autograd.grad(plain, (hidden, head)), torch.autograd.grad(ours, (hidden, head)), strict=True
    )
    for wanted, got in pairs:
        assert torch.allclose(wanted, got, atol=1e-6)
