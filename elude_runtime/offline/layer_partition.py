"""From one layer's token statistics to its partition, concepts and feature table."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.offline.collect import LayerStatistics, TokenStore
from elude_runtime.offline.feature_table import table_rows
from elude_runtime.offline.images import Progress
from elude_runtime.partition import REST_CONCEPT, REST_EDGE, Partition, SplitConfig
from elude_runtime.partition.concepts import concept_activation, concept_share, describe, group_concepts, subunit_share
from elude_runtime.partition.sign_split import sign_split
from elude_runtime.partition.sums import wide_weight


def partition_layer(
    one: LayerStatistics,
    stores: dict[int, tuple[TokenStore, list[Tensor]]],
    config: SplitConfig,
    concepts: int,
    report: Progress,
) -> tuple[Partition, list[pa.Table]]:
    """Partition and feature table of one layer, all token types.

    stores: for every live token type, the inputs of its end tokens and the ids of the positive and the negative end.
    A token type without effect has all its edges in `rest`, so that it stays lossless too.
    """
    linear, layer = one.linear, one.layer
    weight = linear.weight().cpu()
    d, n, _ = weight.shape
    width = config.subunits + 1
    types = layer.layout.types
    edges = torch.full((types, d, n), REST_EDGE, dtype=torch.uint8)
    counts = torch.zeros(types, d, dtype=torch.uint8)
    mean, std = torch.zeros(types, d, width), torch.zeros(types, d, width)
    concept = torch.full((types, d, width), REST_CONCEPT, dtype=torch.int32)
    per_group = d // linear.groups
    tables: list[pa.Table] = []
    stage = f"partition of {layer.name}"
    for t in range(types):
        if t in stores:
            store, (positive, negative) = stores[t]

            def read(neurons: Tensor, ids: Tensor, store: TokenStore = store) -> Tensor:
                return store.read(ids, neurons // per_group)

            edges[t], counts[t] = sign_split(
                weight, read, positive, negative, config, lambda k: report(stage, k, d * len(one.types))
            )
        slots = torch.where(edges[t] == REST_EDGE, config.subunits, edges[t].long())
        wide = wide_weight(weight, slots, width)  # [d, M + 1, n, q]
        groups = torch.arange(d) // per_group
        mean[t] = torch.einsum("kmjq,kjq->km", wide.double(), one.mean(t).cpu()[groups]).float()
        if t not in stores:
            continue
        centred = _sample_sums(one.samples[t].take(), wide, groups) - mean[t]
        std[t] = centred.std(0, correction=0)
        concept[t] = group_concepts(centred, std[t], counts[t], concepts, config.seed)
        partition = Partition(edges, counts, mean, std, concept)
        tables += _tables(layer.name, t, centred, partition)
    return Partition(edges, counts, mean, std, concept), tables


def _sample_sums(reads: Tensor, wide: Tensor, groups: Tensor) -> Tensor:
    """Sub-unit sums of sampled tokens: reads [S, G, n, q], wide [d, M + 1, n, q] -> [S, d, M + 1]."""
    parts = []
    for group in range(reads.shape[1]):
        rows = wide[groups == group].flatten(2)  # [d/G, M + 1, n q]
        parts.append((reads[:, group].flatten(1) @ rows.flatten(0, 1).T).unflatten(1, rows.shape[:2]))
    return torch.cat(parts, 1)


def _tables(layer: str, token_type: int, centred: Tensor, partition: Partition) -> list[pa.Table]:
    """Feature rows of one token type: its concepts, then its sub-units (those without an edge left out)."""
    concepts = partition.concepts(token_type)
    concept, std = partition.concept[token_type], partition.std[token_type]
    numbers = [*range(concepts), None]
    features = [Feature(layer, token_type, i) for i in numbers]
    names = [f.name for f in features]
    slots = partition.concept_slots(token_type)
    # slots without an edge stay out of the count: unused numbers of a neuron, and a background that nothing fell to
    edges = torch.zeros(std.shape, dtype=torch.int32)
    edges.scatter_add_(1, partition.slots(token_type), torch.ones_like(partition.slots(token_type), dtype=torch.int32))
    used = edges > 0
    sizes = torch.bincount(slots[used], minlength=concepts + 1).tolist()
    activations = concept_activation(centred, std, concept, concepts)
    share = concept_share(centred, concept, concepts)
    tables = [table_rows(features, names, sizes, describe(activations, share))]
    neurons, places = used.nonzero(as_tuple=True)
    width = std.shape[1]
    subunits = [
        Feature(layer, token_type, None if m == width - 1 else m, k)
        for k, m in zip(neurons.tolist(), places.tolist(), strict=True)
    ]
    chosen = centred[:, used]
    of = [names[c] for c in slots[used].tolist()]
    own = subunit_share(centred)[used]
    tables.append(table_rows(subunits, of, edges[used].tolist(), describe(chosen, own)))
    return tables
