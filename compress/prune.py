"""The three cuts, in order: heads and hidden width, MLP width, layers.

Each takes an in-memory transformers model and calibration batches and returns a new, smaller model; the
model given is left as it was.
"""

from compress.calibrate import CalibrationBatch
from compress.depth import prune_depth
from compress.mlp import prune_mlp
from compress.stage import StageReport
from compress.width import prune_width

__all__ = ["CalibrationBatch", "StageReport", "prune_depth", "prune_mlp", "prune_width"]
