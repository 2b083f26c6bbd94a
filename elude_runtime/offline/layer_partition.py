"""From one layer's token statistics to its partition, concepts and feature table."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.offline.collect import LayerStatistics
from elude_runtime.offline.feature_table import table_rows
from elude_runtime.offline.images import Progress
from elude_runtime.offline.ranks import Ranks
from elude_runtime.offline.resume import Resume
from elude_runtime.offline.token_store import TokenStore
from elude_runtime.partition import REST_CONCEPT, REST_EDGE, Partition, SplitConfig
from elude_runtime.partition.concepts import concept_activation, concept_share, describe, group_concepts, subunit_share
from elude_runtime.partition.sign_split import compact, end_count, neuron_chunks, split_neurons
from elude_runtime.partition.sums import full_width, neuron_groups, sum_edges, wide_weight

_STILL = 1e-30  # a standard deviation below counts as none: weights that decayed to denormals have no reciprocal
_WIDE_FLOATS = 8_000_000  # masked weights held at once


def split_edges(
    one: LayerStatistics,
    stores: dict[int, TokenStore],
    config: SplitConfig,
    ranks: Ranks,
    resume: Resume,
    report: Progress,
) -> tuple[Tensor, Tensor]:
    """The sub-unit of every edge of one layer, uint8 [P, d, n], and their number for each neuron, uint8 [P, d].

    The processes share the chunks of neurons and all get the whole. A token type without effect has all its edges in
    `rest`, so that it stays lossless too.
    """
    name, linear = one.layer.name, one.linear
    weight = linear.weight()
    d, n, _ = weight.shape
    edges = torch.full((len(one.tokens), d, n), REST_EDGE, dtype=torch.uint8)
    counts = torch.zeros(len(one.tokens), d, dtype=torch.uint8)
    per_group = d // linear.groups
    for t, store in stores.items():
        positive, negative = one.ends[t].ends()
        chunks = neuron_chunks(d, positive.shape[1], weight[0].numel())
        saved = f"edges.{name}.{t}"
        done: dict[int, Tensor] = (resume.load(saved) or {"chunks": {}})["chunks"]

        def read(neurons: Tensor, ids: Tensor, store: TokenStore = store) -> Tensor:
            return store.read(ids, neurons // per_group).to(weight.device)

        for number, chunk in enumerate(chunks):
            if ranks.owns(number):
                if number not in done:
                    done[number] = split_neurons(weight, read, positive, negative, config, chunk).cpu()
                report(f"partition of {name}", len(chunk) * ranks.world, d * len(stores))
            if resume.due():
                resume.save(saved, {"chunks": done})
        parts = {number: part for share in ranks.gather(done) for number, part in share.items()}
        ordered = torch.cat([parts[number] for number in range(len(chunks))])
        edges[t], counts[t] = compact(ordered, 2 * end_count(config, positive))
    return edges, counts


def make_concepts(
    one: LayerStatistics,
    stores: dict[int, TokenStore],
    edges: Tensor,
    counts: Tensor,
    config: SplitConfig,
    concepts: int,
) -> tuple[Partition, list[pa.Table]]:
    """Means, standard deviations and concepts of a layer's sub-units, and the rows of its feature table."""
    linear = one.linear
    weight = linear.weight().cpu()
    types, d, _ = edges.shape
    width = config.subunits + 1
    groups = neuron_groups(d, linear.groups)
    mean, std = torch.zeros(types, d, width), torch.zeros(types, d, width)
    concept = torch.full((types, d, width), REST_CONCEPT, dtype=torch.int32)
    sign = torch.ones(types, d, width, dtype=torch.int8)
    rows = full_width(weight, groups, linear.groups).flatten(1)
    tables: list[pa.Table] = []
    for t in range(types):
        slots = torch.where(edges[t] == REST_EDGE, config.subunits, edges[t].long())
        per_edge = (weight.double() * one.mean(t).cpu()[groups]).sum(-1)
        mean[t] = sum_edges(per_edge, slots, width).float()
        if t not in stores:
            continue
        centred = _sample_sums(stores[t].read(one.samples[t].take()), weight, slots, width)
        centred -= mean[t]
        spread = _spread(centred)
        std[t] = torch.where(spread < _STILL, 0, spread)
        concept[t], sign[t] = group_concepts(centred, std[t], counts[t], rows, concepts)
        tables += _tables(one.layer.name, t, centred, Partition(edges, counts, mean, std, concept, sign))
        del centred  # before the next one is made
    return Partition(edges, counts, mean, std, concept, sign), tables


def _sample_sums(reads: Tensor, weight: Tensor, slots: Tensor, width: int) -> Tensor:
    """Sub-unit sums of sampled tokens: reads [S, G, n, q], weight [d, n, q], slots [d, n] -> [S, d, M + 1]."""
    out = torch.empty(len(reads), len(weight), width)
    per_group = len(weight) // reads.shape[1]
    step = max(1, _WIDE_FLOATS // (width * weight[0].numel()))
    for start in range(0, len(weight), step):
        for group in range(start // per_group, (min(start + step, len(weight)) - 1) // per_group + 1):
            rows = slice(max(start, group * per_group), min(start + step, (group + 1) * per_group, len(weight)))
            wide = wide_weight(weight[rows], slots[rows], width).flatten(2).flatten(0, 1)
            out[:, rows] = (reads[:, group].flatten(1) @ wide.T).unflatten(1, (-1, width))
    return out


def _spread(centred: Tensor) -> Tensor:
    """Standard deviation over the sample [S, d, M + 1], without a second copy of it."""
    return torch.cat([part.std(0, correction=0) for part in centred.split(max(1, 4_000_000 // len(centred)), dim=1)])


def _tables(layer: str, token_type: int, centred: Tensor, partition: Partition) -> list[pa.Table]:
    """Feature rows of one token type: its concepts, then its sub-units (those without an edge left out)."""
    concepts = partition.concepts(token_type)
    concept, sign, std = partition.concept[token_type], partition.sign[token_type], partition.std[token_type]
    numbers = [*range(concepts), None]
    features = [Feature(layer, token_type, i) for i in numbers]
    names = [f.name for f in features]
    slots = partition.concept_slots(token_type)
    # slots without an edge stay out of the count: unused numbers of a neuron, and a background that nothing fell to
    edges = torch.zeros(std.shape, dtype=torch.int32)
    edges.scatter_add_(1, partition.slots(token_type), torch.ones_like(partition.slots(token_type), dtype=torch.int32))
    used = edges > 0
    sizes = torch.bincount(slots[used], minlength=concepts + 1).tolist()
    activations = concept_activation(centred, std, concept, sign, concepts)
    share = concept_share(centred, concept, concepts)
    of_itself = [1] * len(features)
    tables = [table_rows(features, names, of_itself, sizes, describe(activations, share))]
    neurons, places = used.nonzero(as_tuple=True)
    width = std.shape[1]
    subunits = [
        Feature(layer, token_type, None if m == width - 1 else m, k)
        for k, m in zip(neurons.tolist(), places.tolist(), strict=True)
    ]
    of = [names[c] for c in slots[used].tolist()]
    statistics = describe(centred.flatten(1), subunit_share(centred).flatten()).take(used.flatten())
    tables.append(table_rows(subunits, of, sign[used].tolist(), edges[used].tolist(), statistics))
    return tables
