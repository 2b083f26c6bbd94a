"""The mathematics of `elude diff`: streamed moments, correlations of linear features, one-to-one matching.

Every feature's activation is linear in its layer's input, so the covariance of any two follows from the covariance C of
the inputs: Cov(a·x, b·x') = a C b. C is streamed over all tokens in float64: memory depends on the layer's width alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.partition import REST_CONCEPT, Partition
from elude_runtime.partition.sums import concept_readout, neuron_groups, sum_edges

# A feature whose standard deviation is below this part of |weights| · rms(input) varies by the rounding of a float32
# forward pass only (another place in the batch alone moves outputs by up to 9e-6): it counts as dead.
ROUNDING = 1e-5
_CHUNK_FLOATS = 8_000_000
_OWN_VARIANCE = 0.05  # least part of a feature's variance that the parts before it leave
_SAME_NUMBER = 1e-9  # breaks ties for the pair with equal numbers, so that identical rewrites give the identity


class Moments:
    """Means and covariances of two sets of variables, old [N, G, a] and new [N, G, b], in float64 over all N tokens
    added; G independent blocks. Without `new`, it is `old` again (and nothing is computed twice)."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []
        self._products: dict[tuple[int, int], Tensor] = {}
        self._shifts: list[Tensor] = []

    def add(self, old: Tensor, new: Tensor | None = None) -> None:
        blocks = [part.double() for part in ([old] if new is None else [old, new])]
        if not self.count:
            # Sums are taken about the first batch's mean: a large common offset would eat the digits of the variance.
            self._shifts = [part.mean(0) for part in blocks]
            self._sums = [torch.zeros_like(shift) for shift in self._shifts]
        self.count += len(old)
        centred = [(part - shift).transpose(0, 1) for part, shift in zip(blocks, self._shifts, strict=True)]
        for i, part in enumerate(centred):
            self._sums[i] += part.sum(1)
            for j in range(i, len(centred)):
                product = part.mT @ centred[j]
                self._products[i, j] = self._products[i, j] + product if (i, j) in self._products else product

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """(old with old [G, a, a], old with new [G, a, b], new with new [G, b, b])"""
        means = [s / self.count for s in self._sums]
        last = len(means) - 1
        pairs = ((0, 0), (0, last), (last, last))
        found = {p: self._products[p] / self.count - means[p[0]][:, :, None] * means[p[1]][:, None] for p in set(pairs)}
        return found[pairs[0]], found[pairs[1]], found[pairs[2]]


@dataclass(frozen=True)
class Correlations:
    """Pearson correlations of old and new features, in independent blocks (one for concepts, one a neuron for
    sub-units): values and random [blocks, F_old, F_new]; live_old [blocks, F_old], live_new [blocks, F_new].

    values are 0 where one of the two is dead. random: `old` against a size-matched random version of `new`.
    first: number of the first block. among_old, among_new (concepts only): correlations within each side.
    """

    first: int
    values: np.ndarray
    random: np.ndarray
    live_old: np.ndarray
    live_new: np.ndarray
    among_old: np.ndarray | None = None
    among_new: np.ndarray | None = None


class LayerMoments:
    """What is streamed of one layer and token type that both checkpoints split.

    shared: both read the same inputs. subunits: gather what sub-units need (a matrix as wide as the layer's input).
    """

    def __init__(self, old: SplitState, new: SplitState, token_type: int, *, shared: bool, subunits: bool) -> None:
        self.states, self.token_type, self.shared = (old, new), token_type, shared
        # each with its sign: fitted ones would all read the layer's main direction, and match less
        dealt = new.partition.concept.clone()
        dealt[token_type] = shuffle_concepts(dealt[token_type], torch.Generator().manual_seed(0))
        self.readouts = [_readout(old, token_type), _readout(new, token_type)]
        self.random_readout = _readout(new, token_type, dealt)
        self.concepts, self.inputs = Moments(), Moments() if subunits else None
        self.power: list[Tensor] = []
        self.count = 0

    def add(self, old: Tensor, new: Tensor) -> None:
        """The inputs of a batch's tokens, as `LinearMap.patches` gives them for each: [N, G, n, q]."""
        reads = [old.flatten(2).double()] if self.shared else [old.flatten(2).double(), new.flatten(2).double()]
        power = [r.square().sum(0) for r in reads]
        self.power = [a + b for a, b in zip(self.power, power, strict=True)] if self.power else power
        self.count += len(old)
        first, last = reads[0].flatten(1), reads[-1].flatten(1)
        after = torch.cat([self.readouts[1], self.random_readout])
        self.concepts.add((first @ self.readouts[0].T)[:, None], (last @ after.T)[:, None])
        if self.inputs is not None:
            self.inputs.add(*reads)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.power)

    def concept_correlations(self) -> Correlations:
        """All old with all new concepts, `rest` left out: one block."""
        oo, on, nn = self.concepts.covariances()
        rms = self._rms()
        scale = [r.abs() @ rms[i].flatten() for i, r in ((0, self.readouts[0]), (1, self.readouts[1]))]
        noise = torch.cat([scale[1], self.random_readout.abs() @ rms[1].flatten()])
        return _correlate(0, on, _diagonal(oo), _diagonal(nn), scale[0][None], noise[None], (oo, nn))

    def subunit_correlations(self) -> Iterator[Correlations]:
        """The sub-units of every neuron with each other, `rest` left out: a block a neuron, some neurons at a time."""
        assert self.inputs is not None, "sub-units were not asked for"
        covariances, rms = self.inputs.covariances(), self._rms()
        old, new = self.states
        weights = [s.linear.weight(torch.float64) for s in self.states]
        slots = [s.partition.slots(self.token_type) for s in self.states]
        dealt = shuffle_edges(slots[1], weights[1].sum(-1).sign(), torch.Generator().manual_seed(0))
        groups = neuron_groups(old.linear.neurons, old.linear.groups)
        sizes = [w[0].numel() * s.partition.subunits for w, s in zip(weights, self.states, strict=True)]
        step = max(1, _CHUNK_FLOATS // max(1, *sizes))
        for group in range(old.linear.groups):
            neurons = (groups == group).nonzero()[:, 0]
            oo, on, nn = (c[group] for c in covariances)
            for chosen in neurons.split(step):
                first = _rows(weights[0][chosen], slots[0][chosen], old.partition.subunits)
                last = [_rows(weights[1][chosen], s[chosen], new.partition.subunits) for s in (slots[1], dealt)]
                after = torch.cat(last, 1)  # [c, 2 M_new, n q]
                crossed = first @ on
                own = crossed if self.shared else first @ oo  # shared inputs have one covariance
                variance = (own * first).sum(-1), ((after @ nn) * after).sum(-1)
                noise = [rows.abs() @ rms[i][group] for i, rows in enumerate((first, after))]
                yield _correlate(int(chosen[0]), crossed @ after.mT, *variance, noise[0], noise[1])

    def _rms(self) -> list[Tensor]:
        """Root mean square of every input [G, n q], of the old and of the new checkpoint's layer."""
        found = [(p / max(1, self.count)).sqrt() for p in self.power]
        return [found[0], found[-1]]


def _readout(state: SplitState, token_type: int, concept: Tensor | None = None) -> Tensor:
    """float64 [K, G n q]: the read-out of the numbered concepts. Offsets do not matter to a correlation."""
    partition = state.partition if concept is None else replace(state.partition, concept=concept)
    readout, _ = concept_readout(state.linear.weight(torch.float64), partition, token_type, state.linear.groups)
    return readout[:-1].flatten(1)


def _rows(weight: Tensor, slots: Tensor, subunits: int) -> Tensor:
    """The numbered sub-units' read-outs: weight [c, n, q], slots [c, n] -> [c, M, n q]."""
    mask = slots[:, None] == torch.arange(subunits, device=slots.device)[:, None]
    return (weight[:, None] * mask[..., None]).flatten(2)


def _diagonal(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1)


def _correlate(
    first: int,
    covariance: Tensor,
    old: Tensor,
    new: Tensor,
    noise_old: Tensor,
    noise_new: Tensor,
    among: tuple[Tensor, Tensor] | None = None,
) -> Correlations:
    """covariance [blocks, F_old, 2 F_new] and variances of old and new features, real ones and random ones; scales to
    which ROUNDING is relative; covariances among the old ones and among the new ones."""
    live = [v > (ROUNDING * n).square() for v, n in ((old, noise_old), (new, noise_new))]
    scale = [torch.where(alive, v, torch.inf).rsqrt() for alive, v in zip(live, (old, new), strict=True)]

    def correlation(c: Tensor, i: int, j: int) -> np.ndarray:
        # to the digits that float64 sums are exact to: a feature's correlation with itself is 1, not 0.9999999999999998
        return (c * scale[i][..., None] * scale[j][..., None, :]).round(decimals=12).clamp(-1, 1).cpu().numpy()

    values = correlation(covariance, 0, 1)
    real = values.shape[-1] // 2
    within = [None, None] if among is None else [correlation(c, i, i)[0] for i, c in enumerate(among)]
    return Correlations(
        first, values[..., :real], values[..., real:], live[0].cpu().numpy(), live[1][..., :real].cpu().numpy(),
        within[0], None if within[1] is None else within[1][:real, :real],
    )  # fmt: skip


def shuffle_concepts(concept: Tensor, generator: torch.Generator) -> Tensor:
    """The same number of members for every concept, dealt anew: concept [d, M + 1], `rest` stays as it is."""
    flat = concept.flatten().cpu().clone()
    members = (flat != REST_CONCEPT).nonzero()[:, 0]
    flat[members] = flat[members[torch.randperm(len(members), generator=generator)]]
    return flat.view(concept.shape).to(concept.device)


def agreeing_signs(weight: Tensor, groups: int, partition: Partition, token_type: int, inputs: Tensor) -> Tensor:
    """int8 [d, M + 1]: of every sub-unit, the sign of its correlation with the plain mean of its concept's members, at
    inputs [S, G n q]. weight [d, n, q] of the layer.

    Members dealt at random have no signs of their own, and without any they would cancel out: too easy to beat.
    """
    plain = replace(partition, sign=torch.ones_like(partition.sign))
    readout, _ = concept_readout(weight, plain, token_type, groups)
    inputs = inputs - inputs.mean(0)
    along = (inputs @ readout.flatten(1).T).T @ inputs  # [K + 1, G n q]: covariance of every input with each mean
    by_input = along.unflatten(1, (groups, *weight.shape[1:]))  # [K + 1, G, n, q]
    own, edges = neuron_groups(len(weight), groups, weight.device), partition.edge_concepts(token_type)  # [d], [d, n]
    places = torch.arange(weight.shape[1], device=weight.device)
    moved = (weight * by_input[edges, own[:, None], places]).sum(-1)  # [d, n]
    found = sum_edges(moved, partition.slots(token_type), partition.subunits + 1)
    return torch.where(found < 0, -1, 1).to(torch.int8)


def shuffle_edges(slots: Tensor, sign: Tensor, generator: torch.Generator) -> Tensor:
    """The edges of every neuron dealt anew among its sub-units, sizes and signs kept: slots, sign [d, n] -> [d, n].

    The sign of its weight alone says a good deal about which sub-unit an edge goes to; a baseline without it would be
    too easy to beat.
    """
    slots, sign = slots.cpu(), sign.cpu().long()
    draws = torch.rand(slots.shape, generator=generator, dtype=torch.float64)
    places = (sign + draws).argsort(1)  # by sign, in random order within it
    labels = slots.gather(1, sign.argsort(dim=1, stable=True))
    return torch.empty_like(slots).scatter_(1, places, labels).to(slots.device)


def match(values: np.ndarray, live_old: np.ndarray, live_new: np.ndarray) -> np.ndarray:
    """The one-to-one matching with the largest sum of correlations: int [F_old], the new feature of each, -1 for none.

    values [F_old, F_new]. Leaving a feature alone counts 0, so that none is forced on a partner it does not correlate
    with (Kuhn 1955; scipy's linear_sum_assignment).
    """
    weights = np.where(live_old[:, None] & live_new, values.clip(min=0), 0.0)
    same = np.arange(min(weights.shape))
    weights[same, same] += np.where(weights[same, same] > 0, _SAME_NUMBER, 0.0)
    rows, columns = linear_sum_assignment(weights, maximize=True)
    partner = np.full(len(values), -1)
    kept = weights[rows, columns] > 0
    partner[rows[kept]] = columns[kept]
    return partner


def runner_up(values: np.ndarray, partner: np.ndarray, live_old: np.ndarray, live_new: np.ndarray) -> np.ndarray:
    """int [F_old]: the new feature that correlates most with each old one, its partner left out; -1 for none."""
    left = np.where(live_old[:, None] & live_new, values, -np.inf)
    taken = partner >= 0
    left[np.nonzero(taken)[0], partner[taken]] = -np.inf
    if not left.shape[1]:
        return np.full(len(left), -1)
    best = left.argmax(1)
    return np.where(np.isfinite(left[np.arange(len(left)), best]), best, -1)


def inverse(partner: np.ndarray, size: int) -> np.ndarray:
    """int [F_new]: the old feature that each new one is the partner of; -1 for none."""
    out = np.full(size, -1)
    taken = partner >= 0
    out[partner[taken]] = np.nonzero(taken)[0]
    return out


def made_of(with_parts: np.ndarray, among_parts: np.ndarray, gain: float) -> tuple[list[int], float]:
    """The parts that one feature is a sum of, and its multiple correlation with them.

    with_parts [F]: its correlations with the candidates; among_parts [F, F]: theirs with each other (0 for the dead).
    Forward selection: the next part is the one that explains most of what the others leave of the variance, with a
    positive weight, and `gain` of the variance at least. So a near-duplicate of a part is none.
    """
    left, among = with_parts.astype(np.float64), among_parts.astype(np.float64)
    parts: list[int] = []
    explained = 0.0
    while len(left):
        own = among.diagonal()
        gains = np.where((own > _OWN_VARIANCE) & (left > 0), left**2 / own.clip(min=_OWN_VARIANCE), 0.0)
        best = int(gains.argmax())
        if gains[best] < gain:
            break
        parts.append(best)
        explained += float(gains[best])
        column = among[:, best] / among[best, best]
        left = left - column * left[best]
        among = among - np.outer(column, among[best])
    return parts, min(1.0, explained) ** 0.5
