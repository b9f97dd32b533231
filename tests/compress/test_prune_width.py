"""Stage 1: nothing lost where nothing is cut, exact on a low-rank stream, better with repair than without."""

from dataclasses import replace

import pytest
import torch

from compress.basis import channel_basis, fit_readers, pca_basis, stream_statistics
from compress.calibrate import calibration_kl, reference_scores
from compress.heads import choose_heads
from compress.prune import prune_width
from compress.repair import refit_columns
from compress.width import narrowed
from models.families import Shape, resized_config
from models.losses import ValidTokens

FAMILIES = ("llama-tied", "llama-untied", "llama-bias", "mistral", "qwen2", "qwen3")


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in rows])


def in_pca_basis(model, kept, rows, trie):
    """Return the model with its stream in `kept` principal components, nothing else cut."""
    basis = pca_basis(stream_statistics(model, rows), kept)
    config = resized_config(model.config, replace(Shape.of(model.config), hidden_size=kept))
    readers = fit_readers(model, rows, trie, {"pca": basis})["pca"]
    return narrowed(model.config, config, model.state_dict(), basis, readers)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_returns_the_same_logits(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    same, report = prune_width(model, Shape.of(model.config), calibration_rows, catalogue_trie, seed=0)
    torch.testing.assert_close(logits(same, calibration_rows), logits(model, calibration_rows))
    assert report.calibration_kl == pytest.approx(0, abs=1e-6)
    assert report.choices == {}
    assert type(same) is type(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_pca_at_full_width_changes_nothing(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    if model.config.tie_word_embeddings:
        torch.nn.init.constant_(model.model.norm.weight, 1.25)  # a tied head cannot take up the basis
    valid = ValidTokens(catalogue_trie)
    reference = reference_scores(model, calibration_rows, valid)
    turned = in_pca_basis(model, 128, calibration_rows, catalogue_trie)
    assert not torch.allclose(turned.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=1e-2)
    assert calibration_kl(turned, calibration_rows, valid, reference) < 1e-6
    torch.testing.assert_close(
        logits(turned, calibration_rows), logits(model, calibration_rows), rtol=1e-3, atol=1e-3
    )


def with_low_rank_stream(model, rank):
    """Confine all that is written to the stream to a random `rank`-dimensional subspace."""
    hidden = model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, rank, generator=torch.Generator().manual_seed(5)))[0]
    inside = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ inside)
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.copy_(inside @ output.weight)
                if output.bias is not None:
                    output.bias.copy_(inside @ output.bias)
    return model


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "llama-bias", "qwen2", "qwen3"])
def test_a_rank_40_stream_is_cut_to_40_without_loss(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    config = family_config(family, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    config.rms_norm_eps = 1e-3  # large enough that a wrong eps or scale shows
    model = with_low_rank_stream(random_model(config), 40)
    if config.tie_word_embeddings:
        torch.nn.init.constant_(model.model.norm.weight, 1.25)
    narrow, report = prune_width(
        model,
        replace(Shape.of(config), hidden_size=40),
        calibration_rows,
        catalogue_trie,
        seed=0,
    )
    assert narrow.config.hidden_size == 40
    assert narrow.config.rms_norm_eps == pytest.approx(1e-3 * 64 / 40)
    assert report.choices["hidden"] == "pca"
    assert report.choices["hidden_pca_kl"] == report.calibration_kl < 1e-6
    assert report.choices["hidden_channels_kl"] > 1e-2
    torch.testing.assert_close(
        logits(narrow, calibration_rows), logits(model, calibration_rows), rtol=1e-3, atol=1e-3
    )


def test_unused_channels_are_found_and_cost_nothing(
    family_config, random_model, calibration_rows, catalogue_trie
):
    """Channels nobody writes go first; the tied final norm stays exact for channel selection."""
    model = random_model(family_config("llama-tied"))
    used = torch.arange(128) % 4 != 0
    with torch.no_grad():
        model.model.embed_tokens.weight[:, ~used] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[~used] = 0
            layer.mlp.down_proj.weight[~used] = 0
    narrow, report = prune_width(
        model, replace(Shape.of(model.config), hidden_size=96), calibration_rows, catalogue_trie, seed=0
    )
    assert report.choices["hidden_channels_kl"] < 1e-6
    torch.testing.assert_close(
        logits(narrow, calibration_rows), logits(model, calibration_rows), rtol=1e-3, atol=1e-3
    )


def test_refitted_readers_beat_plain_ones(family_config, random_model, calibration_rows, catalogue_trie):
    model = random_model(family_config("llama-untied"))
    valid = ValidTokens(catalogue_trie)
    reference = reference_scores(model, calibration_rows, valid)
    basis = pca_basis(stream_statistics(model, calibration_rows), 64)
    fitted = fit_readers(model, calibration_rows, catalogue_trie, {"pca": basis})["pca"]
    plain = replace(fitted, bases=[basis] * len(fitted.bases))
    kls = []
    for readers in (fitted, plain):
        config = resized_config(model.config, replace(Shape.of(model.config), hidden_size=64))
        narrow = narrowed(model.config, config, model.state_dict(), basis, readers)
        kls.append(calibration_kl(narrow, calibration_rows, valid, reference))
    assert kls[0] < 0.9 * kls[1]


def test_massive_channels_enter_the_basis_as_they_are(family_config, random_model, calibration_rows):
    model = random_model(family_config("llama-untied"))
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 77] = 5000.0  # the start token's, as in trained models
    statistics = stream_statistics(model, calibration_rows)
    assert statistics.massive_channels().tolist() == [77]
    basis = pca_basis(statistics, 32)
    assert basis[77].tolist() == [1.0] + [0.0] * 31
    torch.testing.assert_close(basis.T @ basis, torch.eye(32, dtype=torch.float64))


def test_channel_basis_keeps_the_best_in_order():
    basis = channel_basis(torch.tensor([0.1, 5.0, 0.2, 3.0]), 2)
    assert basis.tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]


def test_kv_groups_are_chosen_before_their_heads():
    full = Shape(1, 64, 6, 3, 8, 16)
    # Group sums 4, 6, 5: groups 1 and 2 stay, though group 0 has the best head.
    scores = torch.tensor([[3.9, 0.1, 2.0, 4.0, 2.4, 2.6]])
    heads = choose_heads(scores, full, replace(full, num_heads=2, num_kv_heads=2))
    assert heads.groups[0].tolist() == [1, 2]
    assert heads.query_heads[0].tolist() == [3, 5]
    assert heads.key_columns(0).tolist() == [*range(8, 24)]
    assert heads.query_columns(0).tolist() == [*range(24, 32), *range(40, 48)]
    ties = choose_heads(torch.zeros(1, 6), full, replace(full, num_heads=3, num_kv_heads=3))
    assert ties.query_heads[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_write_nothing_go_first_and_cost_nothing(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    silent_group, silent_head = 0, 1  # in the other group
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.o_proj.weight
            weight[:, silent_group * 64 : silent_group * 64 + 64] = 0
            weight[:, 64 + silent_head * 32 : 96 + silent_head * 32] = 0
    shape = replace(Shape.of(model.config), num_heads=1, num_kv_heads=1)
    pruned, report = prune_width(model, shape, calibration_rows, catalogue_trie, seed=0)
    assert report.kept["kv_groups"] == [[1]] * 4
    assert report.kept["query_heads"] == [[2]] * 4
    torch.testing.assert_close(
        logits(pruned, calibration_rows), logits(model, calibration_rows), rtol=1e-4, atol=1e-4
    )


def test_output_repair_beats_plain_columns(family_config, random_model, calibration_rows, catalogue_trie):
    model = random_model(family_config("mistral"))
    shape = replace(Shape.of(model.config), num_heads=2)
    valid = ValidTokens(catalogue_trie)
    repaired, report = prune_width(model, shape, calibration_rows, catalogue_trie, seed=0)
    with torch.no_grad():
        for n, layer in enumerate(repaired.model.layers):
            columns = [32 * head + c for head in report.kept["query_heads"][n] for c in range(32)]
            layer.self_attn.o_proj.weight.copy_(model.model.layers[n].self_attn.o_proj.weight[:, columns])
    reference = reference_scores(model, calibration_rows, valid)
    assert report.calibration_kl < 0.9 * calibration_kl(repaired, calibration_rows, valid, reference)


def test_refit_finds_the_column_that_another_can_replace():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    x[:, 5] = 2 * x[:, 0] - x[:, 3]
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 1, 2, 3, 4])
    refitted = refit_columns(weight, x.T @ x[:, kept] / len(x), kept)
    plain = (x[:, kept] @ weight[:, kept].T - x @ weight.T).square().mean()
    left = (x[:, kept] @ refitted.T - x @ weight.T).square().mean()
    assert left < 1e-3 * plain
    everything = torch.arange(6)
    assert torch.equal(refit_columns(weight, x.T @ x, everything), weight)


def test_the_teacher_is_left_as_it_was(family_config, random_model, calibration_rows, catalogue_trie):
    model = random_model(family_config("llama-bias"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    shape = Shape(4, 64, 2, 1, 32, 192)
    first, report = prune_width(model, shape, calibration_rows, catalogue_trie, seed=0)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again, report_again = prune_width(model, shape, calibration_rows, catalogue_trie, seed=0)
    assert report == report_again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
