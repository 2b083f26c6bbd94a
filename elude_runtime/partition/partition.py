"""A partition of a linear layer: which sub-unit every edge belongs to, and which concept every sub-unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REST_EDGE = 255  # stored index of the background sub-unit in `edges`
REST_CONCEPT = 65535  # stored index of the background concept
MAX_SUBUNITS = 254


@dataclass(frozen=True)
class Partition:
    """Edges -> sub-units -> concepts of one layer, per token type; lossless at both levels.

    P token types, d neurons (output channels), n input channels per group, M sub-units at most; the last slot of the
    axes `M + 1` is the background sub-unit `rest`.

    edges    uint8   [P, d, n]      sub-unit of every edge; 255 = rest
    counts   uint8   [P, d]         number of sub-units of each neuron
    mean     float32 [P, d, M + 1]  calibration mean of the sub-unit's sum s, in units of the layer's output
    std      float32 [P, d, M + 1]  calibration standard deviation of s
    concept  int32   [P, d, M + 1]  concept of every sub-unit; 65535 = rest
    sign     int8    [P, d, M + 1]  1 or -1: whether the sub-unit rises or falls as its concept's activation rises
    """

    edges: Tensor
    counts: Tensor
    mean: Tensor
    std: Tensor
    concept: Tensor
    sign: Tensor

    @property
    def types(self) -> int:
        return self.edges.shape[0]

    @property
    def neurons(self) -> int:
        return self.edges.shape[1]

    @property
    def subunits(self) -> int:
        """M, the number of slots before `rest`."""
        return self.mean.shape[2] - 1

    def concepts(self, token_type: int) -> int:
        """Number of concepts of a token type, `rest` not counted."""
        named = self.concept[token_type][self.concept[token_type] != REST_CONCEPT]
        return int(named.max()) + 1 if named.numel() else 0

    def slots(self, token_type: int, neurons: Tensor | None = None) -> Tensor:
        """int64 [d, n]: the slot (0..M, M = rest) on the axis M + 1 for every edge; [F, n] of chosen neurons."""
        edges = self.edges[token_type] if neurons is None else self.edges[token_type, neurons]
        return torch.where(edges == REST_EDGE, self.subunits, edges.long())

    def concept_slots(self, token_type: int) -> Tensor:
        """int64 [d, M + 1]: the concept of every sub-unit, `rest` as the last index K."""
        concept = self.concept[token_type].long()
        return torch.where(concept == REST_CONCEPT, self.concepts(token_type), concept)

    def edge_concepts(self, token_type: int) -> Tensor:
        """int64 [d, n]: the concept (0..K, K = rest) that every edge ends up in."""
        return self.concept_slots(token_type).gather(1, self.slots(token_type))

    def member_std(self, token_type: int) -> Tensor:
        """float32 [d, M + 1]: std with 1 where a sub-unit never varied, so that z-scores of a dead sub-unit are 0."""
        std = self.std[token_type]
        return torch.where(std > 0, std, torch.ones_like(std))

    def live(self, token_type: int) -> Tensor:
        """bool [d, M + 1]: sub-units that vary over the calibration tokens; only these count in a concept's mean."""
        return self.std[token_type] > 0

    def signed_std(self, token_type: int) -> Tensor:
        """float32 [d, M + 1]: by how much a sub-unit moves as its concept's activation rises by 1; 0 for a dead one."""
        return self.std[token_type] * self.sign[token_type]

    def problems(self) -> list[str]:
        """What is wrong with the stored indices, a sentence each; empty for a partition that is well-formed."""
        found: list[str] = []
        counts = self.counts.long()
        if int(counts.max()) > self.subunits:
            found.append(f"a neuron claims {int(counts.max())} sub-units where at most {self.subunits} are stored")
        out_of_range = (self.edges != REST_EDGE) & (self.edges.long() >= counts[..., None])
        if bool(out_of_range.any()):
            t, k, j = out_of_range.nonzero()[0].tolist()
            found.append(
                f"{int(out_of_range.sum())} edges name a sub-unit out of range, the first at token type {t}, neuron "
                f"{k}, input {j}: sub-unit {int(self.edges[t, k, j])} of {int(counts[t, k])}"
            )
        for t in range(self.types):
            named = self.concept[t][self.concept[t] != REST_CONCEPT]
            absent = self.concepts(t) - int(named.unique().numel())
            if absent:
                found.append(f"{absent} concepts of token type {t} have no member")
        if bool((self.sign.abs() != 1).any()):
            found.append("the sign of a sub-unit in its concept is neither 1 nor -1")
        if not bool(torch.isfinite(self.mean).all()) or not bool(torch.isfinite(self.std).all()):
            found.append("a mean or a standard deviation is not finite")
        elif bool((self.std < 0).any()):
            found.append("a standard deviation is negative")
        return found
