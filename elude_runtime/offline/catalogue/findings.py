"""What a catalogue says of every feature, put together from the passes: exemplars, links, labels and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from elude_runtime.checkpoint.catalogue import PEAK_LEVELS
from elude_runtime.checkpoint.exemplars import DUPLICATE, INPUT, NEGATIVE, POSITIVE
from elude_runtime.network.tokens import LETTERS, POSITION
from elude_runtime.offline.catalogue.automatic_labels import StandingOut, label_texts
from elude_runtime.offline.catalogue.effects import LISTED, ClassEffects
from elude_runtime.offline.catalogue.image_pass import ImagePass
from elude_runtime.offline.catalogue.layer_pass import TOP, LayerPass, TypePass
from elude_runtime.offline.catalogue.links import Links, feature_links
from elude_runtime.offline.catalogue.selection import block_roles, input_roles, neuron_roles
from elude_runtime.offline.catalogue.tables import LINKS_SCHEMA, RoleColumns, texts
from elude_runtime.offline.feature_table import class_effects, with_columns


@dataclass(frozen=True, eq=False)
class Group:
    """Exemplars of some features, by the numbers of their names."""

    names: list[str]
    roles: list[RoleColumns]


@dataclass(frozen=True, eq=False)
class TypeFindings:
    """What was found out about the features of one layer and token type, in the order of `TypeFeatures`. links: None
    where the layer's inputs are too many for their covariance; effects: None where they were not measured; peak_edges
    float32 [F, 11]: quantiles of the peak over peak_images images."""

    groups: list[Group]
    rows: torch.Tensor
    labels: list[str]
    links: Links | None
    effects: ClassEffects | None
    names: list[str]
    channels: int
    peak_edges: torch.Tensor
    peak_images: int


@dataclass(frozen=True, eq=False)
class Findings:
    """All of a catalogue. groups: every exemplar, features in the table's order within a layer and token type and its
    neurons, and then the layer's inputs."""

    types: list[TypeFindings]
    groups: list[Group]

    @classmethod
    def of(
        cls, passed: ImagePass, effects: Mapping[str, Sequence[ClassEffects | None]], classes: Sequence[str]
    ) -> Findings:
        """effects: of each layer's token types; classes: their names, none where the model has no labels."""
        types, groups, standing = [], [], StandingOut(passed.answers, classes)
        for name, layer in passed.layers.items():
            for one, effect in zip(layer.types, effects[name], strict=True):
                types.append(_type_findings(layer, one, standing, effect))
                groups += types[-1].groups
                groups += _neuron_groups(name, one)
            groups.append(_input_group(layer))
        return cls(types, groups)


def _type_findings(
    layer: LayerPass, one: TypePass, standing: StandingOut, effects: ClassEffects | None
) -> TypeFindings:
    names = [f.name for f in one.own.features]
    groups, labels = [], list[str]()
    for block in one.blocks:
        shown = {
            POSITIVE: standing.shown(block.positive.places[:TOP]),
            NEGATIVE: standing.shown(block.negative.places[:TOP]),
        }
        own = names[len(labels) : len(labels) + len(block.readout)]
        groups.append(Group(own, block_roles(block, standing.answers, shown)))
        labels += label_texts(shown[POSITIVE], shown[NEGATIVE], standing.classes)
    channels, links = layer.split.linear.groups * layer.split.linear.inputs, None
    if one.moments.kept and names:
        concepts = sum(f.neuron is None for f in one.own.features)
        readout = torch.cat([b.readout for b in one.blocks])
        links = feature_links(readout, one.moments.covariance(), channels, concepts)
    peaks = [block.sampled_peaks() for block in one.blocks]
    quantiles = [np.quantile(own.numpy(), PEAK_LEVELS, axis=0).T for own in peaks]
    edges = torch.from_numpy(np.concatenate([np.zeros((0, len(PEAK_LEVELS))), *quantiles]).astype(np.float32))
    return TypeFindings(
        groups, one.own.rows, labels, links, effects, names, channels, edges, len(peaks[0]) if peaks else 0
    )


def _neuron_groups(layer: str, one: TypePass) -> Iterator[Group]:
    """The exemplars of the neurons themselves, which a feature's stand beside: `LAYER/y17`, on prefix tokens
    `LAYER/y17c`."""
    letter, start = "" if one.own.token_type == POSITION else LETTERS[one.own.token_type], 0
    for ends in one.neurons:
        numbers = range(start, start + len(ends.readout))
        yield Group([f"{layer}/y{number}{letter}" for number in numbers], neuron_roles(ends))
        start += len(ends.readout)


def _input_group(layer: LayerPass) -> Group:
    """The exemplars of a layer's input channels."""
    count = layer.inputs.keys.shape[1]
    return Group([f"{layer.split.name}/x{channel}" for channel in range(count)], input_roles(layer.inputs))


def described(table: pa.Table, findings: Sequence[TypeFindings]) -> pa.Table:
    """The feature table with what was found; what an earlier catalogue said goes."""
    labels, known = np.full(len(table), None, dtype=object), np.zeros(len(table), bool)
    classes, effects = np.zeros((2, len(table), LISTED), np.int64), np.zeros((2, len(table), LISTED), np.float32)
    images = np.zeros(len(table), np.int32)
    for one in findings:
        rows = one.rows.numpy()
        images[rows] = one.peak_images
        labels[rows] = [text or None for text in one.labels]
        if one.effects is not None:
            known[rows] = True
            few = slice(0, one.effects.raised.shape[1])
            classes[:, rows, few] = torch.stack([one.effects.raised, one.effects.lowered]).numpy()
            effects[:, rows, few] = torch.stack([one.effects.raises, one.effects.lowers]).numpy()
    columns = {
        "automatic_label": pa.array(labels, pa.string()),
        "peak_edges": _edge_lists(len(table), findings),
        "peak_images": pa.array(images, pa.int32(), mask=images == 0),
        "stability": pa.nulls(len(table), pa.float32()),  # takes rewrites of its own to measure
        "raises": class_effects(classes[0], effects[0], known),
        "lowers": class_effects(classes[1], effects[1], known),
    }
    return with_columns(table, columns)


def _edge_lists(rows: int, findings: Sequence[TypeFindings]) -> pa.Array:
    """The column `peak_edges`, null for what never varied."""
    edges = np.full((rows, len(PEAK_LEVELS)), np.nan, np.float32)
    for one in findings:
        edges[one.rows.numpy()] = one.peak_edges.numpy()
    known = ~np.isnan(edges).any(1)
    offsets = np.concatenate([[0], (known * len(PEAK_LEVELS)).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(edges[known].flatten()), mask=pa.array(~known))


def link_tables(findings: Sequence[TypeFindings]) -> Iterator[pa.Table]:
    """Of each feature its inputs, then its duplicates."""
    for one in findings:
        if one.links is None:
            continue
        links = one.links
        others = torch.cat([links.inputs, torch.where(links.duplicates >= 0, links.duplicates + one.channels, -1)], 1)
        values = torch.cat([links.shares, links.correlations], 1)
        feature, column = (others >= 0).nonzero(as_tuple=True)
        duplicate = column >= links.inputs.shape[1]
        names = [*map(str, range(one.channels)), *one.names]
        columns = {
            "feature": texts(feature.numpy(), one.names),
            "kind": texts(duplicate.numpy(), [INPUT, DUPLICATE]),
            "rank": torch.where(duplicate, column - links.inputs.shape[1], column).numpy().astype(np.int16),
            "other": texts(others[feature, column].numpy(), names),
            "value": values[feature, column].numpy(),
        }
        yield pa.table(columns, schema=LINKS_SCHEMA)
