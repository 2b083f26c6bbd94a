"""The sweep over timm's architectures: everything that must hold for a family, and the README's table of it.

`python tests/families.py` prints the table, `--write` puts it into the README between its markers, and names of
families as further arguments check only those.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from family_list import FAMILIES, Family, build
from support import forward_with, random_partition
from torch import Tensor, nn

from elude_runtime.analysis.edits import Edit
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.manifest import (
    AttributionEntry,
    Calibration,
    LayerEntry,
    Manifest,
    ModelSource,
    TokenTypeEntry,
)
from elude_runtime.network.explicit import ExplicitLayer, explicit_model
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.split_layers import SplitLayer, find_split_layers
from elude_runtime.network.tail_plan import FULL, draft_plans
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.verify import check_additivity, check_explicit
from elude_runtime.partition import Partition

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"
AT_MOST = 6  # layers of a family that are split at once, of every kind that comes up


@dataclass(frozen=True)
class Row:
    """What was found for a family. problems: what does not hold, in words; the table has no row with any."""

    family: Family
    offered: int
    layers: int
    default: str
    tails: str
    additivity: float
    explicit: float
    refusals: list[tuple[str, int]]
    problems: list[str]


def check(family: Family) -> Row:
    """Everything that must hold, on layers of every kind that the family offers."""
    base = build(family)
    size = (3, family.size, family.size)
    found = find_split_layers(base, size)
    offered = [layer for layer in found if layer.offered]
    default = next((layer for layer in found if layer.default), None)
    chosen = some_of_every_kind(offered)
    model = split_model(base, chosen, size)
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    sweep = Sweep(family, base, model, images)
    with torch.no_grad():
        sweep.check_layers(found)
        sweep.check_outputs()
        for layer in chosen:
            sweep.check_tail(layer)
            sweep.check_steering(layer)
    if default is not None:
        sweep.check_gradient(default)
    additivity = check_additivity(model, base, images)
    explicit = check_explicit(base, sweep.explicit, images)
    sweep.expect(bool(additivity.holds), additivity.detail)
    sweep.expect(bool(explicit.holds), explicit.detail)
    modes = Counter(model.tails.plans[layer.name].mode for layer in chosen)
    return Row(
        family,
        len(offered),
        len(found),
        default.name if default else "none",
        ", ".join(
            mode if len(modes) == 1 else f"{mode} {count}" for mode, count in sorted(modes.items(), reverse=True)
        ),
        max(max(errors.values()) for errors in additivity.figures.values()),
        explicit.figures["float64"],
        Counter(layer.reason for layer in found if not layer.offered).most_common(2),
        sweep.problems,
    )


def some_of_every_kind(offered: list[SplitLayer]) -> list[SplitLayer]:
    """The default, the first and the last, and one more of every kind of layer, in network order."""
    kinds: dict[Any, SplitLayer] = {"default": next((x for x in offered if x.default), offered[-1])}
    kinds["first"], kinds["last"] = offered[0], offered[-1]
    for layer in offered[len(offered) // 2 :] + offered[: len(offered) // 2]:
        shape = (layer.layout.types, layer.layout.grid is None, layer.layout.total == 1)
        kinds.setdefault(
            (layer.kind, max(layer.kernel, default=0) > 1, layer.groups > 1, layer.weighted, *shape), layer
        )
    names = {layer.name for layer in list({id(x): x for x in kinds.values()}.values())[:AT_MOST]}
    return [layer for layer in offered if layer.name in names]


def split_model(base: nn.Module, layers: list[SplitLayer], size: tuple[int, int, int]) -> EludeModel:
    """The model with random partitions of the layers."""
    partitions: dict[str, Partition] = {}
    for number, layer in enumerate(layers):
        partitions[layer.name] = random_partition(number, layer.neurons, layer.inputs, layer.layout.types)
    entries = [
        LayerEntry(
            name=layer.name,
            kind="conv" if layer.kind == "conv" else "linear",
            neurons=layer.neurons,
            inputs=layer.inputs,
            kernel=list(layer.kernel),
            groups=layer.groups,
            subunits=partitions[layer.name].subunits,
            total=layer.layout.total,
            prefix=layer.layout.prefix,
            grid=list(layer.layout.grid) if layer.layout.grid else None,
            token_types=[
                TokenTypeEntry(name=TYPE_NAMES[t], live=True, concepts=partitions[layer.name].concepts(t), tokens=1)  # type: ignore[arg-type]
                for t in range(layer.layout.types)
            ],
            follows=layer.reason,
            attribution=AttributionEntry(auto="gradient", completeness={}, images=0),
        )
        for layer in layers
    ]
    manifest = Manifest(
        format_version=1,
        elude_version="0",
        model=ModelSource(kind="timm", name="none"),
        output="logits",
        data_config=DataConfig(size, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.9, "center").as_dict(),
        labels=[],
        layers=entries,
        method={},
        seed=0,
        threads=1,
        versions={},
        calibration=Calibration(images=0, sha256=""),
        base_sha256="",
        partition_sha256="",
    )
    return EludeModel(base, manifest, partitions)


@dataclass
class Sweep:
    """The checks of one family's model; what fails is added to `problems`."""

    family: Family
    base: nn.Module
    model: EludeModel
    images: Tensor
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.recording = self.model.record(self.images)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def check_layers(self, found: list[SplitLayer]) -> None:
        """Every linear layer is listed once, with a reason; the default is one of the offered."""
        linear = {n for n, m in self.base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self.expect(sorted(layer.name for layer in found) == sorted(linear), "not every linear layer is listed once")
        self.expect(all(layer.reason for layer in found), "a layer has no reason")
        self.expect(sum(layer.default for layer in found) <= 1, "several defaults")
        self.expect(all(layer.offered and not layer.classifier for layer in found if layer.default), "a wrong default")

    def check_outputs(self) -> None:
        """The base model's outputs, bit for bit, recording or not; outputs that differ from image to image."""
        z = self.base(self.images)
        self.expect(bool(z.isfinite().all()) and not torch.equal(z[0], z[1]), "the model is dead")
        self.expect(torch.equal(self.model(self.images), z), "the outputs are not the base model's")
        self.expect(torch.equal(self.recording.logits, z), "the recorded outputs are not the base model's")

    def check_tail(self, layer: SplitLayer) -> None:
        """A null tail is the recorded pass; a changed output does exactly what it does in a full pass; other rows in
        another order do the same but for rounding."""
        name, tails = layer.name, self.model.tails
        y, everything = self.recording.y[name], torch.arange(len(self.images))
        null = tails.run(self.recording, name, y.clone(), everything)
        self.expect(torch.equal(null, self.recording.logits), f"{name}: a null tail is not the recorded pass")
        if tails.plans[name].mode == FULL:
            noise = torch.randn(3, *self.images.shape[1:])
            alone = draft_plans(self.base, [name], noise[:2], noise[2])[name].mode == FULL
            self.expect(alone, f"{name}: its tails are full passes, though modules have finished before it")
        changed = y + y.std() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        found = tails.run(self.recording, name, changed, everything)
        expected = self.full(name, self.images, changed)
        self.expect(torch.equal(found, expected), f"{name}: a tail is not the full pass, off by {off(found, expected)}")
        self.expect(not torch.equal(found, null), f"{name}: it has no effect")
        rows = torch.tensor([2, 0, 2, 1])
        found = tails.run(self.recording, name, changed[rows], rows)
        error = off(found, self.full(name, self.images[rows], changed[rows]))
        self.expect(error < 1e-4, f"{name}: chosen rows are off by {error}")

    def check_steering(self, layer: SplitLayer) -> None:
        """An ablated concept is the full pass in which its write is taken from the layer's output."""
        state = self.model.state(layer.name)
        feature = state.concept_features(0)[0]
        found = self.model.steer(self.images, [Edit(feature.name)])
        y = self.recording.y[layer.name]
        write = state.write(self.recording.x[layer.name], feature)
        expected = self.full(layer.name, self.images, y - state.linear.untokens(write, y))
        self.expect(off(found.steered, expected) < 1e-4, f"{layer.name}: steering is not the full pass")
        self.expect(torch.equal(found.default, self.recording.logits), f"{layer.name}: steering changes the default")

    def check_gradient(self, layer: SplitLayer) -> None:
        """The gradient of a tail is that of the full pass."""
        gradients = []
        direction = torch.randn(self.recording.logits.shape, generator=torch.Generator().manual_seed(3))
        run: list[Callable[[Tensor], Tensor]] = [
            lambda y: self.model.tails.run(self.recording, layer.name, y, torch.arange(len(self.images))),
            lambda y: self.full(layer.name, self.images, y),
        ]
        for tail in run:
            leaf = self.recording.y[layer.name].clone().requires_grad_()
            gradients += torch.autograd.grad((tail(leaf) * direction).sum(), leaf)
        self.expect(off(*gradients) < 1e-5, f"{layer.name}: gradients are off by {off(*gradients)}")
        self.expect(bool(gradients[0].any()), f"{layer.name}: there is no gradient")

    def full(self, name: str, images: Tensor, y: Tensor) -> Tensor:
        """A full pass in which a hook replaces the layer's output."""
        return forward_with(self.base, images, {name: lambda _, out: y.reshape(out.shape)})

    def explicit(self, dtype: torch.dtype) -> nn.Module:
        """The explicit form, which must really run."""
        layers = {n: (s.partition, s.layout) for n, s in self.model.states.items()}
        wide = explicit_model(self.base, layers, dtype)
        ran: set[str] = set()
        for name, module in wide.named_modules():
            if isinstance(module, ExplicitLayer):
                module.register_forward_hook(lambda *_, name=name: ran.add(name))
        wide.register_forward_hook(lambda *_: self.expect(ran >= set(layers), "an explicit layer does not run"))
        return wide


def off(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| family (model) | offered | default | tails | additivity | explicit | refused most often: followed by … |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in rows]
    return "\n".join(lines)


def line(row: Row) -> str:
    """A row of the table."""
    cells = [
        f"{row.family.name} (`{row.family.model}`)",
        f"{row.offered} / {row.layers}",
        f"`{row.default}`" if row.default != "none" else "none",
        row.tails,
        f"{row.additivity:.0e}",
        f"{row.explicit:.0e}",
        ", ".join(f"{short(reason)} {count}" for reason, count in row.refusals) or "none",
    ]
    return f"| {' | '.join(cells)} |"


def short(reason: str) -> str:
    """A reason for a narrow column; what is no "followed by …" stands in brackets."""
    if not reason.startswith("followed by "):
        return f"({reason.split(':')[0]})"
    return reason.removeprefix("followed by ").removeprefix("a nonlinearity (").removesuffix(")")


def listed(text: str) -> list[str]:
    """The families of a README's table, `NAME (MODEL)` each."""
    body = text[text.index(BEGIN) : text.index(END)]
    rows = [line.split("|")[1].strip().replace("`", "") for line in body.splitlines() if line.startswith("|")]
    return rows[2:]


def figures(text: str, timm_version: str) -> dict[str, list[str]] | None:
    """By family the cells of a README's table that are the same on every machine: all but the rounding errors. None
    where the table is of another timm, which may well build other networks."""
    body = text[text.index(BEGIN) : text.index(END)]
    if f"timm {timm_version}." not in body:
        return None
    return {
        name: stable(row) for name, row in zip(listed(text), body[body.index("|---") :].splitlines()[1:], strict=False)
    }


def stable(row: str) -> list[str]:
    """The cells of a row without the two rounding errors."""
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    return [*cells[:4], *cells[6:]]


def main() -> None:
    wanted = [name for name in sys.argv[1:] if name != "--write"]
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        if not family.available or (wanted and family.name not in wanted):
            continue
        rows.append(check(family))
        print(family.name, *rows[-1].problems, sep="\n   ", file=sys.stderr)
    text = table(rows)
    if "--write" in sys.argv:
        whole = README.read_text(encoding="utf-8")
        start, stop = whole.index(BEGIN) + len(BEGIN), whole.index(END)
        made = f"\nMade with timm {timm.__version__}.\n\n{text}\n"
        README.write_text(whole[:start] + made + whole[stop:], encoding="utf-8")
    else:
        print(text)
    if any(row.problems for row in rows):
        raise SystemExit("Not everything holds.")


if __name__ == "__main__":
    main()
