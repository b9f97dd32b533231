"""The distance from the full model on validation users, against plain forwards over prompt and title."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.measure import Yardstick
from compress.work import open_array, write_array
from models.checkpoint import load_model, read_recommender
from models.errors import LeanRecError
from tests.tiny import make_tiny_recommender, tiny_model


def naive_path(model, titles, prompt, title) -> np.ndarray:
    """Log-probabilities of the tokens that may follow, wherever there are several, along one title."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *title]])).logits[0].double()
    found = []
    for at in range(len(title)):
        allowed = sorted({other[at] for other in titles if other[:at] == title[:at] and len(other) > at})
        if len(allowed) > 1:
            found.append(torch.log_softmax(logits[len(prompt) + at - 1][allowed], 0).numpy())
    return np.concatenate(found)


def test_the_distance_is_the_kl_along_the_way_to_each_next_item(tmp_path: Path) -> None:
    data = make_tiny_recommender(tmp_path / "full", num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    full, model = load_model(recommender), tiny_model("llama", recommender.config.vocab_size, seed=7)
    users = data.test.sample(40, 0)  # more than a batch, of prompts of several lengths
    titles = recommender.prompter.title_tokens
    prompts = [recommender.prompt_of(users.histories[at].tolist()) for at in range(len(users))]
    theirs, ours = (
        np.concatenate(
            [
                naive_path(each, titles, prompt, titles[target])
                for prompt, target in zip(prompts, users.targets.tolist(), strict=True)
            ]
        )
        for each in (full, model)
    )
    yardstick = Yardstick(recommender, users)
    nll, paths = yardstick.paths(full)
    assert nll == pytest.approx(yardstick.nll(full), abs=1e-6)
    np.testing.assert_allclose(paths, theirs, atol=0.1)  # its products may be bf16
    write_array(tmp_path / "full.npy", paths)
    kept = open_array(tmp_path / "full.npy", tmp_path)
    found = yardstick.validation(model, kept)
    assert found.kl == pytest.approx((np.exp(theirs) * (theirs - ours)).sum() / len(users), rel=0.01)
    assert found.kl > 0.1
    assert found.nll == pytest.approx(yardstick.nll(model), abs=1e-6)
    assert yardstick.validation(full, kept).kl == pytest.approx(0, abs=1e-6)


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    file = tmp_path / "full.npy"
    with pytest.raises(LeanRecError, match=r"full\.npy: is damaged or missing; remove .*full and run"):
        open_array(file, tmp_path / "full")
    write_array(file, np.zeros(100, np.float32))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LeanRecError, match=r"full\.npy: is damaged or missing; remove .*full and run"):
        open_array(file, tmp_path / "full")
