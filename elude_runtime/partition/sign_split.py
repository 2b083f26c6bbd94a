"""The sign-split partition: which edges of a neuron work together, from the tokens at each of its two ends.

Source: our reading of ELUDe (arXiv 2605.31304); design "Choosing the partition".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.errors import SettingsError
from elude_runtime.partition.kmeans import kmeans
from elude_runtime.partition.partition import MAX_SUBUNITS, REST_EDGE

CHUNK_FLOATS = 4_000_000  # contributions held at once: 16 MB of float32, so that clustering works in the cache


@dataclass(frozen=True)
class SplitConfig:
    """Parameters of the partition; recorded in the manifest.

    subunits: M, sub-units a neuron at most, half of them for each end; tokens: N, calibration tokens at each end;
    per_image: tokens one image may give to one end; outlier: a token whose input norm exceeds this multiple of the
    median norm is not used (register-like artefacts); seed: of the neurons' k-means and of the token sample.
    """

    subunits: int = 8
    tokens: int = 400
    per_image: int = 4
    outlier: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.subunits <= MAX_SUBUNITS or self.subunits % 2:
            raise SettingsError(f"The number of sub-units must be even and between 2 and {MAX_SUBUNITS}.")
        if self.tokens < 2 or self.per_image < 1:
            raise SettingsError("The number of tokens must be at least 2, and of tokens per image at least 1.")
        if not 0 <= self.seed < 2**63:
            raise SettingsError("The seed must be a whole number from 0 to 2^63 - 1.")


def end_clusters(inputs: Tensor, weight: Tensor, clusters: int, draws: Tensor) -> Tensor:
    """Mean normalised contribution of every edge in each cluster of one end's tokens.

    inputs [B, N, n, q]: the layer's input at the end's N tokens of B neurons; weight [B, n, q]; draws [B, clusters].
    Contributions w_kj x_j are centred over the tokens and normalised to unit length, then clustered.
    Returns [B, clusters, n].
    """
    if inputs.shape[-1] == 1:
        contributions = inputs[..., 0] * weight[:, None, :, 0]
    else:
        contributions = torch.einsum("bnjq,bjq->bnj", inputs, weight)
    low, high = torch.aminmax(contributions, dim=1, keepdim=True)
    # What an input that never changes leaves after centring is rounding; normalised, it would look like a signal.
    rounding = 8 * torch.finfo(contributions.dtype).eps * torch.maximum(low.abs(), high.abs())
    contributions -= contributions.mean(1, keepdim=True)
    contributions *= (high - low) > rounding
    contributions /= contributions.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(contributions.dtype).tiny)
    return kmeans(contributions, clusters, draws)[1]


def assign_edges(weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The sign split: edge j goes to the cluster that its contribution serves most, at the end that it pushes to.

    weight [B, n, q] (its sign is that of the sum over kernel positions), positive and negative [B, C, n] from
    `end_clusters`. Returns uint8 [B, n]: 0..C-1 clusters of the positive end, C..2C-1 of the negative; ties and zero
    weights 255 (`rest`).
    """
    clusters = positive.shape[1]
    sign = weight.sum(-1).sign()
    up, up_tied = _strict_argmax(positive)
    down, down_tied = _strict_argmax(-negative)
    edges = torch.where(sign > 0, up, down + clusters)
    tied = torch.where(sign > 0, up_tied, down_tied)
    return torch.where((sign == 0) | tied, REST_EDGE, edges).to(torch.uint8)


def _strict_argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """(argmax over dim 1, whether more than one entry reaches the maximum). A single cluster never ties."""
    best = values.amax(1)
    tied = (values == best[:, None]).sum(1) > 1
    return values.argmax(1), tied


def compact(edges: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Renumber sub-units so that none is empty: edges uint8 [d, n] -> (edges uint8 [d, n], counts uint8 [d])."""
    present = torch.zeros(edges.shape[0], REST_EDGE + 1, dtype=torch.bool, device=edges.device)
    present.scatter_(1, edges.long(), True)
    present = present[:, :slots]
    number = (present.long().cumsum(1) - 1).clamp(min=0)
    number = torch.cat([number, torch.full_like(number[:, :1], REST_EDGE).expand(-1, REST_EDGE + 1 - slots)], 1)
    return number.gather(1, edges.long()).to(torch.uint8), present.sum(1).to(torch.uint8)


def neuron_chunks(neurons: int, tokens: int, inputs: int) -> list[range]:
    """Neurons whose contributions [b, tokens, inputs] are held at once. A chunk is also the unit that processes share:
    a batched product's last bits may depend on its size, so the same chunks are made wherever they are computed."""
    step = max(1, CHUNK_FLOATS // max(1, tokens * inputs))
    return [range(start, min(start + step, neurons)) for start in range(0, neurons, step)]


def split_neurons(
    weight: Tensor,
    read: Callable[[Tensor, Tensor], Tensor],
    positive: Tensor,
    negative: Tensor,
    config: SplitConfig,
    chosen: range,
) -> Tensor:
    """Edges of the neurons `chosen`, uint8 [b, n] in 0..2C-1 or 255 (`rest`), C clusters at each end; the arguments are
    those of `sign_split`. With fewer tokens than clusters there are as many clusters as tokens."""
    clusters = end_count(config, positive)
    generator = torch.Generator().manual_seed(config.seed)
    draws = torch.rand(2, weight.shape[0], clusters, generator=generator, dtype=torch.float64).to(weight.device)
    index = torch.arange(chosen.start, chosen.stop)  # on the CPU, like the ids: it may index tensors of any device
    rows = weight[index]
    up = end_clusters(read(index, positive[index]), rows, clusters, draws[0, index].to(rows.dtype))
    down = end_clusters(read(index, negative[index]), rows, clusters, draws[1, index].to(rows.dtype))
    return assign_edges(rows, up, down)


def end_count(config: SplitConfig, ids: Tensor) -> int:
    """Clusters at one end of a neuron: half the sub-units, but no more than there are tokens (ids [d, N])."""
    return min(config.subunits // 2, ids.shape[1])


def sign_split(
    weight: Tensor,
    read: Callable[[Tensor, Tensor], Tensor],
    positive: Tensor,
    negative: Tensor,
    config: SplitConfig,
) -> tuple[Tensor, Tensor]:
    """The partition of one layer for one token type.

    weight float32 [d, n, q]; positive and negative int64 [d, N] on the CPU: ids of the tokens at each end of every
    neuron, best first; read(neurons [B], ids [B, N]) -> [B, N, n, q], the layer's inputs at those tokens, where the
    weight is.
    Returns edges uint8 [d, n] and counts uint8 [d].
    """
    chunks = neuron_chunks(len(weight), positive.shape[1], weight[0].numel())
    parts = [split_neurons(weight, read, positive, negative, config, chunk) for chunk in chunks]
    return compact(torch.cat(parts), 2 * end_count(config, positive))
