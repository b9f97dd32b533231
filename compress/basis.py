"""A narrower residual stream: the basis it is written in, and how each reader is refitted to it.

The stream x `[hidden]` becomes Qᵀx `[kept]` for one orthonormal Q `[hidden, kept]` in the whole model;
channel selection is the Q of unit vectors. RMSNorm forgets length but not width: with every weight
sqrt(hidden / kept) and eps * hidden / kept it gives exactly Qᵀ of what it gave, wherever the stream lies
inside the basis. Source: SliceGPT (arXiv 2401.15024), with RMSNorm kept in the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, Observer, observe
from compress.repair import RIDGE
from models.trie import Trie

# What counts as a massive activation: Sun et al., arXiv 2402.17762.
MASSIVE, MASSIVE_OVER_TYPICAL = 100.0, 1000.0


class StreamStatistics:
    """Second moments of a normalised stream and its extremes, over all norm inputs.

    Each token counts by its weight whatever its length, as it does for the readers behind an RMSNorm.
    """

    def __init__(self) -> None:
        self.moment: Tensor | float = 0.0
        self.largest: Tensor | None = None
        self.magnitude: Tensor | float = 0.0
        self.weight = 0.0

    def __call__(self, inputs: Tensor, weights: Tensor) -> None:
        unit = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.moment = self.moment + ((unit * weights[:, None]).T @ unit).double()
        size = inputs.abs()
        peak = size.amax(0)
        self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        self.magnitude = self.magnitude + (size * weights[:, None]).sum(0).double()
        self.weight += float(weights.sum(dtype=torch.float64))

    def massive_channels(self) -> Tensor:
        """Return the channels with massive activations, the largest first, int64."""
        assert self.largest is not None
        assert isinstance(self.magnitude, Tensor)
        typical = (self.magnitude / self.weight).median()
        massive = (self.largest > MASSIVE) & (self.largest > MASSIVE_OVER_TYPICAL * typical)
        order = self.largest.argsort(descending=True, stable=True)
        return order[massive[order]]


def stream_statistics(model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> StreamStatistics:
    """Return the statistics of the residual stream at all norm inputs."""
    statistics = StreamStatistics()
    observe(model, batches, dict.fromkeys(norms_of(model), statistics))
    return statistics


def norms_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the norms on the residual stream, in order: two a layer, then the final one."""
    layers = model.model.layers
    inner = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [*inner, model.model.norm]


def pca_basis(statistics: StreamStatistics, kept: int) -> Tensor:
    """Return Q: unit vectors of massive channels, then the top eigenvectors of the rest.

    Returns:
        float64 `[hidden, kept]`, orthonormal, each column's largest entry positive.
    """
    moment = statistics.moment
    assert isinstance(moment, Tensor)
    hidden = len(moment)
    massive = statistics.massive_channels()[: kept // 2]
    rest = torch.ones(hidden, dtype=torch.bool, device=moment.device)
    rest[massive] = False
    others = rest.nonzero().squeeze(1)
    vectors = torch.linalg.eigh(moment[others][:, others]).eigenvectors.flip(1)
    basis = moment.new_zeros(hidden, kept)
    basis[massive, torch.arange(len(massive), device=moment.device)] = 1.0
    basis[others, len(massive) :] = vectors[:, : kept - len(massive)]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return basis * signs


def channel_basis(scores: Tensor, kept: int) -> Tensor:
    """Return Q that keeps the channels with the largest scores `[hidden]`, in their order."""
    channels = scores.argsort(descending=True, stable=True)[:kept].sort().values
    return torch.eye(len(scores), dtype=torch.float64, device=scores.device)[:, channels]


@dataclass(frozen=True)
class Readers:
    """What replaces a norm's input in its readers: W' = W diag(weight) bases[norm].

    `bases` are float64 `[hidden, kept]`, one per norm in the order of `norms_of`; Q itself where nothing
    was lost, and what least squares makes of the kept directions where something was.
    """

    bases: list[Tensor]
    final_weight: Tensor
    """float64 `[kept]`: the final norm's weight where the head is tied and cannot take up the basis"""


class _Refit:
    """Cross moments of what a norm gave, x / rms(x), with what it gives in the basis."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis.float()
        self.lost: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0

    def __call__(self, inputs: Tensor, weights: Tensor) -> None:
        hidden = len(self.basis)
        normal = inputs * (hidden**0.5 / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30))
        inside = normal @ self.basis
        narrow = inside * (hidden**0.5 / inside.norm(dim=1, keepdim=True).clamp_min(1e-30))
        weighted = narrow * weights[:, None]
        self.lost = self.lost + ((normal - narrow @ self.basis.T).T @ weighted).double()
        self.gram = self.gram + (narrow.T @ weighted).double()

    def reader_basis(self) -> Tensor:
        """Return Q + E[(x - Q z) zᵀ] (E[z zᵀ] + lambda I)^-1, float64 `[hidden, kept]`."""
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.lost, Tensor)
        ridge = RIDGE * self.gram.diagonal().mean()
        regular = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return self.basis.double() + torch.linalg.solve(regular, self.lost, left=False)

    def tied_weight(self, plain: Tensor, embedding: Tensor, norm_weight: Tensor) -> Tensor:
        """Return the diagonal g that brings E Q diag(g) z nearest to E diag(norm_weight) x.

        Args:
            plain: diag(Qᵀ diag(norm_weight) Q), which the ridge pulls towards, `[kept]`.
            embedding: rows of the tied embedding that predict titles, float64 `[tokens, hidden]`.
        """
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.lost, Tensor)
        basis = self.basis.double()
        inside = embedding @ basis
        crossed = self.lost + basis @ self.gram  # E[x zᵀ]
        wanted = ((embedding.T @ inside) * (norm_weight[:, None] * crossed)).sum(0)
        normal = (inside.T @ inside) * self.gram
        ridge = RIDGE * normal.diagonal().mean()
        regular = normal + ridge * torch.eye(len(normal), dtype=torch.float64, device=normal.device)
        return plain + torch.linalg.solve(regular, wanted - normal @ plain)


def fit_readers(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    bases: Mapping[str, Tensor],
    *,
    refit: bool = True,
) -> dict[str, Readers]:
    """Return for each basis how the readers of a model's norms should read a stream in it.

    Args:
        refit: fit them to the calibration batches; without it, what is lost is lost.
    """
    norms = norms_of(model)
    final = model.model.norm.weight.detach().double()
    plain = {name: (basis.square() * final[:, None]).sum(0) for name, basis in bases.items()}
    if not refit:
        return {name: Readers([basis for _ in norms], plain[name]) for name, basis in bases.items()}
    refits = {name: [_Refit(basis) for _ in norms] for name, basis in bases.items()}
    # One pass fits all bases.
    together = zip(*refits.values(), strict=True)
    observe(model, batches, {norm: _each_of(fits) for norm, fits in zip(norms, together, strict=True)})
    if model.config.tie_word_embeddings:
        tokens = torch.from_numpy(trie.child_tokens).to(final.device).long().unique()
        embedding = model.lm_head.weight.detach()[tokens].double()
        plain = {name: refits[name][-1].tied_weight(plain[name], embedding, final) for name in bases}
    return {name: Readers([fit.reader_basis() for fit in refits[name]], plain[name]) for name in bases}


def _each_of(observers: Sequence[Observer]) -> Observer:
    def see(inputs: Tensor, weights: Tensor) -> None:
        for observer in observers:
            observer(inputs, weights)

    return see
