"""What a feature is made of, and which others it resembles: read off the covariance of the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INPUTS = 10
DUPLICATES = 5
_ROWS = 1000  # features whose correlations with all others are in memory at once
_LEAST_VARIANCE = 1e-30


@dataclass(frozen=True, eq=False)
class Links:
    """Of each of F features: inputs int64 [F, 10], its input channels with the largest shares of its variance, and
    shares [F, 10], signed; duplicates int64 [F, 5], the features of its kind with the largest correlations of
    activations in absolute value, and correlations [F, 5], signed. -1 where there is none."""

    inputs: Tensor
    shares: Tensor
    duplicates: Tensor
    correlations: Tensor


def feature_links(readout: Tensor, covariance: Tensor, channels: int, concepts: int) -> Links:
    """readout [F, C], the first `concepts` of its rows those of concepts; covariance float64 [C, C] of what tokens
    read, columns by channel and kernel position.

    The activation of a feature is r . x + a, so that its variance is r' S r, the part of it that channel j's reads
    carry r_j' (S r)_j, and its covariance with another feature r' S q.
    """
    count = len(readout)
    wanted = min(INPUTS, channels)
    duplicates, correlations = torch.full((count, DUPLICATES), -1), torch.zeros(count, DUPLICATES)
    rows = readout.double()
    reached = rows @ covariance  # [F, C]
    parts = (rows * reached).unflatten(1, (channels, -1)).sum(2)
    variance = parts.sum(1)
    live = variance > _LEAST_VARIANCE
    scale = torch.where(live, variance, 1)
    share = torch.where(live[:, None], parts / scale[:, None], 0)
    best = share.abs().topk(wanted, dim=1).indices
    found = share.gather(1, best)
    inputs = torch.where(found != 0, best, -1).cpu()
    deviation = scale.sqrt()
    for kind in (slice(0, concepts), slice(concepts, count)):
        own = torch.arange(kind.start, kind.stop, device=readout.device)
        few = min(DUPLICATES, len(own) - 1)
        if few < 1:
            continue
        for part in own.split(_ROWS):
            correlation = (reached[part] @ rows[own].T) / deviation[part, None] / deviation[None, own]
            correlation = correlation.clamp(-1, 1)
            correlation[~(live[part, None] & live[None, own])] = 0
            correlation[torch.arange(len(part)), part - kind.start] = 0
            nearest = correlation.abs().topk(few, dim=1).indices
            found = correlation.gather(1, nearest)
            duplicates[part.cpu(), :few] = torch.where(found != 0, own[nearest], -1).cpu()
            correlations[part.cpu(), :few] = found.float().cpu()
    return Links(inputs, share.gather(1, best).float().cpu(), duplicates, correlations)
