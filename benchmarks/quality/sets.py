"""The data sets of the quality benchmark and the full models compressed on them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Set:
    """A data set, and how its full model is made."""

    name: str
    """of its folder under `--data-root`; `ml-100k` comes with a wheel"""
    label: str | None = None
    """told apart by this where a data set has several full models; None for the name"""
    base: str
    """what `finetune --base` takes"""
    epochs: int
    max_history: int
    """titles of a prompt: 10 by the protocol of the `_d3` sets"""
    learning_rate: float
    batch_tokens: int = 2048
    keep_titles: float = 0.85
    piece_titles: float | None = None
    vocab: str
    """what `compress --vocab` takes"""

    @property
    def key(self) -> str:
        """What `--sets` takes, and the name of its folder of runs."""
        return self.label or self.name


SETS = {
    chosen.key: chosen
    for chosen in (
        Set(
            name="amazon18_cds_vinyl_d3",
            base="smollm2-135m",
            epochs=10,
            max_history=10,
            learning_rate=1e-3,
            batch_tokens=8192,
            keep_titles=1.0,
            piece_titles=3,
            vocab="catalog",
        ),
        Set(
            name="amazon18_video_games_d3",
            base="smollm2-135m",
            epochs=2,
            max_history=10,
            learning_rate=1e-3,
            batch_tokens=8192,
            keep_titles=1.0,
            piece_titles=3,
            vocab="catalog",
        ),
        # The same data without what a language model brings along: within reach of two cores.
        *(
            Set(
                name=name,
                label=label,
                base="base",
                epochs=8,
                max_history=10,
                learning_rate=2e-3,
                batch_tokens=4096,
                keep_titles=1.0,
                piece_titles=3,
                vocab="keep",
            )
            for name, label in (
                ("amazon18_video_games_d3", "games-from-scratch"),
                ("amazon18_cds_vinyl_d3", "cds-from-scratch"),
            )
        ),
        Set(
            name="movielens_1m",
            base="base",
            epochs=18,
            max_history=50,
            learning_rate=2e-3,
            batch_tokens=16384,
            vocab="keep",
        ),
        Set(name="ml-100k", base="demo", epochs=10, max_history=50, learning_rate=4e-3, vocab="keep"),
    )
}
TARGETS = ("5%", "2.5%")
PER_LAYER = "per-layer"
"""the default recipe in the per-layer layout"""
CONTROLS = (PER_LAYER, "prunerec", "one-stage", "depth-only", "width-only", "random", "random-targets")
