"""What enters a model's layers, kept between trials: one that changes a layer runs from there on.

Trying each of many layers or halves runs the model hundreds of times, and what lies before the change gives
what it gave. States are kept for every fourth layer: a trial runs up to three layers more than it must, and
the memory is a quarter of what all would take.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, hooked

EVERY = 4

States = dict[int, list[Tensor]]
"""By layer number n: what enters the first layer that runs of n and those after it, `[batch, seq, hidden]` of
each calibration batch"""


class LayerStates:
    """The states of a model whose parts go one by one."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> None:
        self._model, self._batches = model, batches
        self._known: States = {}
        self._numbers = range(EVERY, len(model.model.layers), EVERY)

    @contextmanager
    def trying(
        self, changed: int, layers: Sequence[int]
    ) -> Iterator[tuple[Sequence[CalibrationBatch], States]]:
        """Let the model run over some layers only, from the last state that the change leaves as it was.

        Args:
            changed: number of the first layer that is gone or does something else than it did.
            layers: numbers of those that run.

        Yields:
            The batches to run the model on, and the states after the change, which are there once it ran.
        """
        start = max((number for number in self._known if number <= changed), default=0)
        run = [number for number in layers if number >= start]
        batches = self._batches
        if start:
            entering = self._known[start]
            batches = [replace(b, entering=states) for b, states in zip(batches, entering, strict=True)]
        whole, seen = self._model.model.layers, States()
        handles = []
        for number in self._numbers:
            following = [layer for layer in run if layer >= number]
            if number > changed and following:
                see = _append_to(seen.setdefault(number, []))
                handles.append(whole[following[0]].register_forward_pre_hook(see))
        self._model.model.layers = nn.ModuleList([whole[layer] for layer in run])
        try:
            with hooked(handles):
                yield batches, seen
        finally:
            self._model.model.layers = whole

    def settle(self, changed: int, seen: States) -> None:
        """Take over the states of a trial: its change stays."""
        self._known = {number: known for number, known in self._known.items() if number <= changed} | seen


def _append_to(states: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: states.append(inputs[0].detach())
