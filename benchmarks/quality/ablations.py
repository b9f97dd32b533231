"""Variants of the default recipe, one change each: what decided it, and what the product does not offer."""

from dataclasses import replace

from compress.distill import LossWeights
from compress.method import Method
from compress.recipe import RECIPES, Recipe, Stage

_DEFAULT, _PUBLISHED = RECIPES["leanrec"], RECIPES["prunerec"]
_LAST = _DEFAULT.stages[-1]
ABLATIONS: dict[str, Recipe] = {
    "no-repair": replace(_DEFAULT, method=Method(repair=False)),
    "pca": replace(_DEFAULT, method=Method(hidden=("pca",))),
    "channels": replace(_DEFAULT, method=Method(hidden=("channels",))),
    "published-scores": replace(_DEFAULT, method=Method(scores="prunerec")),
    # The published method, and the last stage at the rate of all others'.
    "published-rate": replace(
        _PUBLISHED,
        stages=(*_PUBLISHED.stages[:2], replace(_PUBLISHED.stages[2], learning_rate=_LAST.learning_rate)),
    ),
    "vocabulary-kl": replace(_DEFAULT, weights=LossWeights(vocabulary=1.0)),
    "both-kl": replace(_DEFAULT, weights=LossWeights(valid=0.5, vocabulary=0.5)),
    "two-stages": replace(
        _DEFAULT,
        stages=(
            Stage(cuts=("width", "mlp"), share=0.1, learning_rate=1e-3, mends=True),
            Stage(cuts=("depth",), share=0.9, keep=0.5),
        ),
    ),
    # For deep pretrained models: weights made anew are a bad first step there, but the better last one.
    "as-cut-slow": replace(
        _DEFAULT,
        stages=(*_DEFAULT.stages[:2], Stage(cuts=("depth",), share=0.90, learning_rate=1e-3)),
    ),
    "halving": replace(
        _DEFAULT,
        stages=(
            *_DEFAULT.stages[:2],
            Stage(cuts=("halving",), share=0.05, learning_rate=5e-4, mends=True),
            Stage(cuts=("depth",), share=0.90, learning_rate=1e-3),
        ),
    ),
    "more-drawings": replace(_DEFAULT, drawings=8),
    # A quarter of the tokens a step, so four times the steps for the same tokens; Adam's rate by the root.
    "small-steps": replace(
        _DEFAULT,
        batch_tokens=1024,
        stages=(*_DEFAULT.stages[:2], replace(_DEFAULT.stages[2], learning_rate=2e-3)),
    ),
    "dropped-titles": replace(_DEFAULT, keep_titles=0.8, drawings=4),
    "same-rate": replace(_DEFAULT, stages=tuple(replace(stage, mends=False) for stage in _DEFAULT.stages)),
    "adamw": replace(_DEFAULT, optimizer="adamw"),
    "random-adamw": replace(RECIPES["random"], optimizer="adamw"),
    "random-four-drawings": replace(RECIPES["random"], drawings=4),
    # Every layer stays, and what is cut still works when the last restoration begins.
    "width-mended": replace(
        RECIPES["width-only"],
        stages=(
            Stage(cuts=("width",), share=0.1, learning_rate=1e-3, mends=True),
            Stage(cuts=("mlp",), share=0.9, learning_rate=2e-3, mends=True),
        ),
    ),
    "as-cut": replace(_DEFAULT, stages=tuple(replace(stage, keep=1.0) for stage in _DEFAULT.stages)),
}


def recipe_of(name: str) -> Recipe:
    """Return the recipe of a row; the per-layer layout is the default's."""
    return {**RECIPES, **ABLATIONS}.get(name, _DEFAULT)
