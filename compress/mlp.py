from typing import Any

from compress.calibrate import CalibrationBatch
from compress.stage import StageReport
from models.families import Shape
from models.trie import Trie


def prune_mlp(model: Any, shape: Shape, batches: list[CalibrationBatch], trie: Trie, *, seed: int = 0) -> tuple[Any, StageReport]:
    raise NotImplementedError
