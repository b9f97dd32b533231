"""What one pruning stage did, for the report."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class StageReport:
    """The choices of one stage and the scores behind them. `to_json` gives plain lists and numbers."""

    name: str
    """`width`, `mlp` or `depth`"""
    parameters: int
    """non-embedding parameters after the stage"""
    calibration_kl: float
    """KL over valid tokens from the model that came in to the one that goes out, nats per title"""
    importances: dict[str, list[list[float]]] = field(default_factory=dict)
    """width: `query_heads` `[layers][heads]`, `kv_groups` `[layers][kv_heads]`, `channels` `[1][hidden]`;
    mlp: `neurons` `[layers][101]` (percentiles); depth: `layers` `[rounds][layers]`, the KL without each
    layer, NaN-free: layers not tried hold -1"""
    kept: dict[str, list[list[int]]] = field(default_factory=dict)
    """width: `query_heads`, `kv_groups` by layer; depth: `layers` `[1][kept]`"""
    choices: dict[str, float | str] = field(default_factory=dict)
    """what was chosen by calibration KL and the KL of each candidate, nats"""
    dropped_layers: tuple[int, ...] = ()

    def to_json(self) -> dict:
        """Return the report as JSON-able values."""
        return asdict(self) | {"dropped_layers": list(self.dropped_layers)}
