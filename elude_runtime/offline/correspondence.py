"""What `elude diff` finds: rows of corresponding features, how well they agree, and the files that hold them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elude_runtime.analysis.features import CONCEPT, SUBUNIT, Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.checkpoint.labels import AUTOMATIC, stored_labels
from elude_runtime.checkpoint.storage import write_file, write_json
from elude_runtime.errors import CheckpointError, SettingsError
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.feature_matching import Correlations, inverse, made_of, match, runner_up
from elude_runtime.offline.feature_table import TABLE, read_table

MATCHED, WEAK, ONLY_OLD, ONLY_NEW, DEAD = "matched", "weak", "only_old", "only_new", "dead"
RANDOM_HIGH = 0.95  # quantile of the pairs with random members that a pair has to reach for its name to be carried
PART_GAIN = 0.2  # of a concept's variance, that each part of a split or merge explains beyond the others


@dataclass(frozen=True)
class Correspondence:
    """One row of the mapping: an old feature and its new one, or a feature of one side only.

    status: "matched" (correlation at least the threshold), "weak" (a partner below it), "only_old" and "only_new" (no
    positively correlated partner was left), "dead" (does not vary on these images). runner_up: the new feature most
    like `old` apart from `new`; rival: the old feature most like `new` apart from `old`; mutual: each of the pair is
    the other's most correlated (None without a pair). Shares are of the layer output's variance, from each checkpoint's
    own calibration; label is the old feature's.
    """

    layer: str
    token_type: str
    kind: str
    status: str
    old: str | None
    new: str | None
    correlation: float | None
    runner_up: str | None
    runner_up_correlation: float | None
    rival: str | None
    rival_correlation: float | None
    mutual: bool | None
    old_share: float | None
    new_share: float | None
    label: str


@dataclass(frozen=True)
class Agreement:
    """How well the features of one layer, token type and kind correspond, over `tokens` tokens.

    old, new: numbered features; old_dead, new_dead: those of them that do not vary; pairs: one-to-one pairs. mean and
    median: correlation over as many pairs as there could be (the smaller number of living features of a layer's
    concepts or a neuron's sub-units; where there is no partner it counts 0); weighted_mean: over the living old
    features, by their share of variance. matched: pairs at the threshold or above; matched_fraction: of all old
    features; matched_share: the old features' share of the output's variance; mutual: those of them in which each is
    the other's most correlated (elsewhere a name could as well go to a sibling). random_*: the same against a version
    of `new` with the same sizes and random members; random_high: the correlation that one in twenty pairs of those
    reaches. None where nothing lives.
    """

    layer: str
    token_type: str
    kind: str
    tokens: int
    old: int
    new: int
    old_dead: int
    new_dead: int
    pairs: int
    mean: float | None
    median: float | None
    weighted_mean: float | None
    matched: int
    matched_fraction: float | None
    matched_share: float
    mutual: int
    random_mean: float | None
    random_high: float | None
    random_matched_fraction: float | None


@dataclass(frozen=True)
class Regrouping:
    """One concept whose counterpart is a sum of several: a split (whole: an old concept, parts: new ones) or a merge
    (the reverse).

    Each part explains a fifth of `whole`'s variance beyond what the parts before it explain. correlations: of each
    part with `whole`; together: the multiple correlation of all of them, at least the threshold.
    """

    whole: str
    parts: list[str]
    correlations: list[float]
    together: float


@dataclass
class Diff:
    """What `diff` found. old, new: facts about the checkpoints; same_base: both were made of the same tensors;
    incomparable: {layer: reason} of layers that both split but whose tokens or neurons do not correspond."""

    old: dict[str, Any]
    new: dict[str, Any]
    same_base: bool
    images: int
    threshold: float
    warnings: list[str]
    only_old: list[str]
    only_new: list[str]
    incomparable: dict[str, str]
    agreement: list[Agreement]
    splits: list[Regrouping]
    merges: list[Regrouping]
    mapping: list[Correspondence]

    def document(self) -> dict[str, Any]:
        """The whole result as JSON values."""
        return asdict(self)

    def carried_labels(self) -> dict[str, str]:
        """{new feature: label of the old one} where a name is safe: in matched pairs, each the other's best, at a
        correlation that one in twenty pairs with random members reaches at most."""
        chance = {(a.layer, a.token_type, a.kind): a.random_high for a in self.agreement}
        return {
            r.new: r.label
            for r in self.mapping
            if r.label and r.new and r.status == MATCHED and r.mutual
            and (r.correlation or 0.0) >= (chance[r.layer, r.token_type, r.kind] or 0.0)
        }  # fmt: skip


@dataclass(frozen=True)
class Catalogue:
    """Shares and labels of a checkpoint's features by name; a labels.csv beside it comes before the table's labels."""

    shares: dict[str, float]
    labels: dict[str, str]

    @classmethod
    def read(cls, checkpoint: Path) -> Catalogue:
        """CheckpointError when the feature table is missing or damaged; `stored_labels` says what labels.csv may be."""
        table = read_table(checkpoint)
        if not {"feature", "share", "label"} <= set(table.column_names):
            raise CheckpointError(f"{checkpoint / TABLE} lacks feature, share or label; make the checkpoint again.")
        names, shares, labels = (table[c].to_pylist() for c in ("feature", "share", "label"))
        # an automatic label speaks of its own catalogue's images: a new catalogue makes the new ones
        sources = table["label_source"].to_pylist() if "label_source" in table.column_names else [None] * len(table)
        named = {n: text for n, text, by in zip(names, labels, sources, strict=True) if text and by != AUTOMATIC}
        return cls(dict(zip(names, shares, strict=True)), {**named, **stored_labels(checkpoint)})


@dataclass
class _Tally:
    """What the agreement of one kind of feature is made of."""

    old: int = 0
    new: int = 0
    old_dead: int = 0
    new_dead: int = 0
    possible: list[float] = field(default_factory=list)
    random: list[float] = field(default_factory=list)
    weighted: float = 0.0
    weight: float = 0.0
    matched_share: float = 0.0
    mutual: int = 0


class Matcher:
    """Matches the features of one layer and token type, block by block, and collects rows and figures.

    states: the layer in the old and the new checkpoint; catalogues: theirs.
    """

    def __init__(
        self,
        token_type: int,
        tokens: int,
        threshold: float,
        states: tuple[SplitState, SplitState],
        catalogues: tuple[Catalogue, Catalogue],
    ) -> None:
        self.layer, self.token_type, self.tokens, self.threshold = states[0].name, token_type, tokens, threshold
        self.partitions = states[0].partition, states[1].partition
        self.catalogues = catalogues
        self.rows: list[Correspondence] = []
        self.splits: list[Regrouping] = []
        self.merges: list[Regrouping] = []
        self._tallies: dict[str, _Tally] = {}

    def add_concepts(self, found: Correlations) -> None:
        """All concepts: one block."""
        sizes = [p.concepts(self.token_type) for p in self.partitions]
        self._add(CONCEPT, found, 0, None, sizes[0], sizes[1])
        assert found.among_old is not None and found.among_new is not None
        sides = ((self.splits, found.values[0], found.among_new), (self.merges, found.values[0].T, found.among_old))
        for into, values, among in sides:
            for whole, row in enumerate(values):
                parts, together = made_of(row, among, PART_GAIN)
                if len(parts) > 1 and together >= self.threshold:
                    names = [self._name(p) for p in parts]
                    into.append(Regrouping(self._name(whole), names, [float(row[p]) for p in parts], together))

    def add_subunits(self, found: Correlations) -> None:
        """Sub-units of some neurons: a block a neuron."""
        counts = [p.counts[self.token_type].tolist() for p in self.partitions]
        for block in range(len(found.values)):
            neuron = found.first + block
            self._add(SUBUNIT, found, block, neuron, counts[0][neuron], counts[1][neuron])

    def agreement(self) -> list[Agreement]:
        """One entry a kind of feature that was added."""
        return [self._agreement(kind, tally) for kind, tally in self._tallies.items()]

    def _add(self, kind: str, found: Correlations, block: int, neuron: int | None, old: int, new: int) -> None:
        values, random = found.values[block][:old, :new], found.random[block][:old, :new]
        live_old, live_new = found.live_old[block][:old], found.live_new[block][:new]
        partner = match(values, live_old, live_new)
        back = inverse(partner, new)
        second = runner_up(values, partner, live_old, live_new)
        rival = runner_up(values.T, back, live_new, live_old)
        tally = self._tallies.setdefault(kind, _Tally())
        shares = [self._shares(i, size, neuron) for i, size in enumerate((old, new))]
        for i in range(old):
            j = int(partner[i])
            r = float(values[i, j]) if j >= 0 else 0.0
            status = DEAD if not live_old[i] else ONLY_OLD if j < 0 else MATCHED if r >= self.threshold else WEAK
            mutual = bool(r >= max(values[i].max(), values[:, j].max())) if j >= 0 else None
            self._row(
                kind, status, neuron, i, j, values, int(second[i]), int(rival[j]) if j >= 0 else -1, shares, mutual
            )
            share = shares[0][i] or 0.0
            if live_old[i]:
                tally.weighted += max(share, 0.0) * r
                tally.weight += max(share, 0.0)
            if status == MATCHED:
                tally.matched_share += share
                tally.mutual += bool(mutual)
        for j in np.nonzero(back < 0)[0].tolist():
            status = ONLY_NEW if live_new[j] else DEAD
            self._row(kind, status, neuron, -1, j, values, -1, int(rival[j]), shares)
        tally.old, tally.new = tally.old + old, tally.new + new
        tally.old_dead += int((~live_old).sum())
        tally.new_dead += int((~live_new).sum())
        number = int(min(live_old.sum(), live_new.sum()))
        tally.possible += _padded(values, partner, number)
        dealt = match(random, live_old, np.ones(new, dtype=bool))
        tally.random += _padded(random, dealt, number)

    def _row(
        self,
        kind: str,
        status: str,
        neuron: int | None,
        old: int,
        new: int,
        values: np.ndarray,
        second: int,
        rival: int,
        shares: list[list[float | None]],
        mutual: bool | None = None,
    ) -> None:
        """A row of the mapping; -1 stands for a feature that is not there."""

        def name(index: int) -> str | None:
            return self._name(index, neuron) if index >= 0 else None

        def value(i: int, j: int) -> float | None:
            return float(values[i, j]) if i >= 0 and j >= 0 else None

        self.rows.append(
            Correspondence(
                self.layer, TYPE_NAMES[self.token_type], kind, status, name(old), name(new), value(old, new),
                name(second), value(old, second), name(rival), value(rival, new), mutual,
                shares[0][old] if old >= 0 else None, shares[1][new] if new >= 0 else None,
                self.catalogues[0].labels.get(name(old) or "", ""),
            )
        )  # fmt: skip

    def _name(self, index: int, neuron: int | None = None) -> str:
        return Feature(self.layer, self.token_type, index, neuron).name

    def _shares(self, side: int, size: int, neuron: int | None) -> list[float | None]:
        return [self.catalogues[side].shares.get(self._name(i, neuron)) for i in range(size)]

    def _agreement(self, kind: str, tally: _Tally) -> Agreement:
        reached = sum(r >= self.threshold for r in tally.possible)
        by_chance = sum(r >= self.threshold for r in tally.random)
        return Agreement(
            self.layer, TYPE_NAMES[self.token_type], kind, self.tokens, tally.old, tally.new, tally.old_dead,
            tally.new_dead,
            pairs=sum(r > 0 for r in tally.possible),
            mean=float(np.mean(tally.possible)) if tally.possible else None,
            median=float(np.median(tally.possible)) if tally.possible else None,
            weighted_mean=tally.weighted / tally.weight if tally.weight else None,
            matched=reached,
            matched_fraction=reached / tally.old if tally.old else None,
            matched_share=tally.matched_share,
            mutual=tally.mutual,
            random_mean=float(np.mean(tally.random)) if tally.random else None,
            random_high=float(np.quantile(tally.random, RANDOM_HIGH)) if tally.random else None,
            random_matched_fraction=by_chance / tally.old if tally.old else None,
        )  # fmt: skip


def _padded(values: np.ndarray, partner: np.ndarray, number: int) -> list[float]:
    """The correlations of the pairs, and 0 for every pair that there could have been and is not."""
    taken = np.nonzero(partner >= 0)[0]
    found = values[taken, partner[taken]].tolist()
    return (found + [0.0] * number)[: max(number, len(found))]


def write_mapping(path: Path, result: Diff) -> None:
    """The mapping as .csv or .parquet (a row a correspondence), or the whole result as .json, by the name's ending."""
    check_ending(path)
    names = [f.name for f in fields(Correspondence)]
    if path.suffix == ".json":
        write_json(path, result.document())
    elif path.suffix == ".csv":
        write_file(path, _csv(names, ([getattr(r, n) for n in names] for r in result.mapping)))
    else:
        types = {"float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
        schema = pa.schema([(f.name, types[str(f.type).partition(" ")[0]]) for f in fields(Correspondence)])
        columns = {n: [getattr(r, n) for r in result.mapping] for n in names}
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
        write_file(path, buffer.getvalue().to_pybytes())


def check_ending(path: Path) -> None:
    """SettingsError unless `write_mapping` knows the ending of the file's name."""
    if path.suffix not in (".csv", ".parquet", ".json"):
        raise SettingsError(f"--out takes a file name that ends in .csv, .parquet or .json, not {path.name!r}.")


def _csv(header: list[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
