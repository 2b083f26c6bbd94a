"""What a catalogue says of every feature, put together from the passes: exemplars, links, labels and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from elude_runtime.checkpoint.exemplars import DUPLICATE, INPUT, NEGATIVE, POSITIVE
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.automatic_labels import label_texts, shown_classes
from elude_runtime.offline.catalogue.effects import ClassEffects
from elude_runtime.offline.catalogue.image_pass import ImagePass
from elude_runtime.offline.catalogue.layer_pass import TOP, LayerPass, TypePass
from elude_runtime.offline.catalogue.links import Links, feature_links
from elude_runtime.offline.catalogue.selection import block_roles, input_roles
from elude_runtime.offline.catalogue.tables import LINKS_SCHEMA, RoleColumns
from elude_runtime.offline.feature_table import class_effects, with_columns


@dataclass(frozen=True, eq=False)
class Group:
    """Exemplars of some features, by the numbers of their names."""

    names: list[str]
    roles: list[RoleColumns]


@dataclass(frozen=True, eq=False)
class TypeFindings:
    """What was found out about the features of one layer and token type, in the order of `TypeFeatures`. links: None
    where the layer's inputs are too many for their covariance; effects: None where they were not measured."""

    groups: list[Group]
    rows: torch.Tensor
    labels: list[str]
    links: Links | None
    effects: ClassEffects | None
    names: list[str]
    channels: int


@dataclass(frozen=True, eq=False)
class Findings:
    """All of a catalogue. groups: every exemplar, features in the table's order within a layer and token type, and then
    the layer's inputs."""

    types: list[TypeFindings]
    groups: list[Group]

    @classmethod
    def of(
        cls, passed: ImagePass, effects: Mapping[str, Sequence[ClassEffects | None]], classes: Sequence[str]
    ) -> Findings:
        """effects: of each layer's token types; classes: their names, none where the model has no labels."""
        types, groups = [], []
        for name, layer in passed.layers.items():
            for one, effect in zip(layer.types, effects[name], strict=True):
                types.append(_type_findings(layer, one, passed.answers, classes, effect))
                groups += types[-1].groups
            groups.append(_input_group(layer))
        return cls(types, groups)


def _type_findings(
    layer: LayerPass, one: TypePass, answers: Answers, classes: Sequence[str], effects: ClassEffects | None
) -> TypeFindings:
    ends = {
        end: [shown_classes(best.places[:TOP], answers, classes) for best in own]
        for end, own in (
            (POSITIVE, [b.positive for b in one.blocks]), (NEGATIVE, [b.negative for b in one.blocks])
        )
    }  # fmt: skip
    names = [f.name for f in one.own.features]
    groups, start = [], 0
    for number, block in enumerate(one.blocks):
        shown = {end: parts[number] for end, parts in ends.items()}
        own = names[start : start + len(block.readout)]
        groups.append(Group(own, block_roles(block, answers, shown)))
        start += len(own)
    channels, links = layer.split.linear.groups * layer.split.linear.inputs, None
    if one.moments.kept and names:
        concepts = sum(f.neuron is None for f in one.own.features)
        readout = torch.cat([b.readout for b in one.blocks])
        links = feature_links(readout, one.moments.covariance(), channels, concepts)
    whole = {end: torch.cat(parts).numpy() if parts else np.zeros((0, 1), np.int64) for end, parts in ends.items()}
    return TypeFindings(groups, one.own.rows, label_texts(whole, classes), links, effects, names, channels)


def _input_group(layer: LayerPass) -> Group:
    """The exemplars of a layer's input channels."""
    count = layer.inputs.keys.shape[1]
    return Group([f"{layer.split.name}/x{channel}" for channel in range(count)], input_roles(layer.inputs))


def described(table: pa.Table, findings: Sequence[TypeFindings]) -> pa.Table:
    """The feature table with what was found; what an earlier catalogue said goes."""
    labels = np.full(len(table), None, dtype=object)
    of_class = {name: _ClassColumn(len(table)) for name in ("raises", "lowers")}
    for one in findings:
        rows = one.rows.numpy()
        labels[rows] = [text or None for text in one.labels]
        if one.effects is not None:
            of_class["raises"].put(rows, one.effects.raised, one.effects.raises)
            of_class["lowers"].put(rows, one.effects.lowered, one.effects.lowers)
    columns = {name: column.array() for name, column in of_class.items()}
    stability = pa.nulls(len(table), pa.float32())  # takes rewrites of its own to measure
    return with_columns(table, {"automatic_label": pa.array(labels, pa.string()), "stability": stability, **columns})


class _ClassColumn:
    """A column of classes and effects, null for the rows that nothing was put into."""

    def __init__(self, rows: int) -> None:
        self.rows, self.parts = rows, list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]()

    def put(self, rows: np.ndarray, classes: torch.Tensor, effects: torch.Tensor) -> None:
        self.parts.append((rows, classes, effects))

    def array(self) -> pa.Array:
        width = max((part[1].shape[1] for part in self.parts), default=0)
        classes, effects = np.zeros((self.rows, width), np.int64), np.zeros((self.rows, width), np.float32)
        there = np.zeros(self.rows, bool)
        for rows, of_class, effect in self.parts:
            classes[rows, : of_class.shape[1]], effects[rows, : effect.shape[1]] = of_class.numpy(), effect.numpy()
            there[rows] = True
        return class_effects(classes, effects, there)


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
        texts = pa.array([*map(str, range(one.channels)), *one.names], pa.string())
        columns = {
            "feature": _dictionary(feature, pa.array(one.names, pa.string())),
            "kind": _dictionary(duplicate, pa.array([INPUT, DUPLICATE])),
            "rank": torch.where(duplicate, column - links.inputs.shape[1], column).numpy().astype(np.int16),
            "other": _dictionary(others[feature, column], texts),
            "value": values[feature, column].numpy(),
        }
        yield pa.table(columns, schema=LINKS_SCHEMA)


def _dictionary(codes: torch.Tensor, values: pa.Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(codes.numpy().astype(np.int32), values).cast(pa.string())
