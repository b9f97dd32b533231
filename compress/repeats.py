"""Windows in which a title comes again and again, for data whose users buy one thing several times.

Training data have few such windows, and a small student learns what it has seen. A full model copies what
it reads: asked about titles that nobody bought twice, it says when to.
"""

import numpy as np

from models.data import Sequences


def has_repeats(sequences: Sequences) -> bool:
    """Return whether an item directly follows itself anywhere."""
    return any((items[1:] == items[:-1]).any() for items in map(sequences.__getitem__, range(len(sequences))))


def repeated(sequences: Sequences, window: int, *, seed: int) -> Sequences:
    """Return of each sequence some titles and the last of them again up to the end of a window.

    The window has two to `window` titles. Which are the sequence's own, and how many, is drawn too: at least
    one, and at least one is a repeat. The windows are in random order.
    """
    rng = np.random.default_rng((seed, 1))
    users, windows = [], []
    for index in rng.permutation(len(sequences)).tolist():
        items = sequences[index]
        if not len(items):
            continue
        length = int(rng.integers(2, window + 1))
        end = 1 + int(rng.integers(len(items)))
        own = items[max(0, end - int(rng.integers(1, length))) : end]
        users.append(sequences.user_ids[index])
        windows.append(np.concatenate([own, np.full(length - len(own), own[-1], own.dtype)]))
    offsets = np.cumsum([0, *map(len, windows)], dtype=np.int64)
    return Sequences(tuple(users), np.concatenate(windows), offsets)
