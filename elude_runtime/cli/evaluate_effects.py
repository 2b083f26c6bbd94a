"""What `elude evaluate` prints of effects: features taken out, attributions beside them, class groups, properties."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from elude_runtime.cli.progress import printer

if TYPE_CHECKING:
    from elude_runtime.offline.evaluation.attribution_effects import Summary
    from elude_runtime.offline.evaluation.estimates import Estimate
    from elude_runtime.offline.evaluation.group_steering import GroupSteering
    from elude_runtime.offline.evaluation.known_properties import KnownProperties
    from elude_runtime.offline.evaluation.result import LayerResult

_DRAWS = 1000
_TAKEN_OUT = {
    "deletion_area": "deletion\narea", "insertion_area": "insertion\narea",
    "side_effect": "change of others\nat equal drop", "drop_per_side_effect": "drop per change\nat equal norm",
}  # fmt: skip


def print_effects(layer: LayerResult) -> None:
    """Everything that was measured by changing the layer's output."""
    if any(one.side for one in layer.effects):
        _print_taken_out(layer)
    if layer.agreement:
        _print_agreement(layer)
    if layer.steering:
        _print_steering(layer)


def figure(estimate: Estimate, digits: int = 3) -> str:
    """A value with its 95 % interval."""
    if estimate.value != estimate.value:
        return "-"
    low, high = estimate.interval
    return f"{estimate.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_of(first: str, *headings: str) -> Table:
    """An empty table without lines: names on the left, figures on the right of their columns."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, vertical="bottom", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    return table


def _print_taken_out(layer: LayerResult) -> None:
    table = table_of("taken out and steered", *_TAKEN_OUT.values())
    for one in layer.effects:
        if one.side:
            figures = one.figures(_DRAWS, 0)
            table.add_row(one.name, *(figure(figures[k]) if k in figures else "-" for k in _TAKEN_OUT))
    printer().print(table)


def _print_agreement(layer: LayerResult) -> None:
    from elude_runtime.offline.evaluation.attribution_effects import EVALUATED, TOP

    headings = [f"{kind} {TOP}\n{name}" for kind in EVALUATED for name in ("Spearman", "slope")]
    table = table_of("attribution against true effect", *headings)
    rows = {(r.features, r.level, r.method, r.set): r for r in layer.agreement}
    for features, level, method in dict.fromkeys(key[:3] for key in rows):
        found = [rows[features, level, method, kind] for kind in EVALUATED]
        name = level if features == "own" else f"{level} of a {features}"
        table.add_row(
            f"{name}, {method.replace('_', ' ')}", *(_summary(s) for row in found for s in (row.spearman, row.slope))
        )
    screen = printer()
    screen.print(table)
    screen.print("[dim]means over images, within each; slope of the true effect on the attribution, 1 if they agree[/]")


def _summary(one: Summary | None) -> str:
    return "-" if one is None else f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _print_steering(layer: LayerResult) -> None:
    from elude_runtime.offline.evaluation.group_steering import AT_DROP, AT_NORM, compare

    screen = printer()
    groups = list(layer.steering[0].taken)
    if not groups:
        screen.print("No class group is ahead of the others, on average, in an image to choose features on.")
        return
    images = ", ".join(f"{g} {len(layer.steering[0].side[AT_DROP][g])}" for g in groups)
    table = table_of("side effect of steering class groups", "at equal\ndrop", "at equal\nnorm", *groups)
    for one in layer.steering:
        table.add_row(
            one.name, _steered(one, AT_DROP), _steered(one, AT_NORM),
            *(f"{_steered(one, AT_DROP, g)} ({one.taken[g]})" for g in groups),
        )  # fmt: skip
    screen.print(table)
    screen.print(
        "[dim]mean |change| of the other classes' centred logits over the drop of the group's, median over images; in "
        f"brackets: features taken out, chosen on other images; images reported: {images}[/]"
    )
    for found in compare(layer.steering, _DRAWS, 0):
        kind = "drop" if found.figure == AT_DROP else "norm"
        value, low, high = found.ratio
        bar = "below half of theirs" if found.bar < 1 else "below theirs"
        screen.print(
            f"at equal {kind}, concepts' side effect over that of {found.against}: {value:.2f} "
            f"[{low:.2f}, {high:.2f}]; {bar}: "
            f"{found.verdict}",
            highlight=False,
        )


def _steered(one: GroupSteering, name: str, group: str | None = None) -> str:
    return figure(one.estimate(name, _DRAWS, 0, group))


def print_properties(found: KnownProperties) -> None:
    """The mean over properties by set and kind, and whether ours are above the others."""
    screen = printer()
    sets = ", ".join(f"{name} {mean:.3f}" for name, mean in sorted(found.means.items(), key=lambda kv: -kv[1])[:5])
    screen.print(f"mean AUC over the known properties, best sets: {sets}")
    table = table_of("best feature of each property", "of", "mean AUC")
    for one in found.contenders.values():
        table.add_row(f"{one.name}  ({', '.join(one.sets)})", str(one.features), f"{one.mean:.3f}")
    screen.print(table)
    for d in found.differences:
        screen.print(
            f"best {_single(d.one)} less best {_single(d.other)}: {d.mean:+.3f}, standard error "
            f"{d.standard_error:.3f}: {d.verdict}",
            highlight=False,
        )


def _single(kind: str) -> str:
    return {"concepts": "concept", "sub-units": "sub-unit"}.get(kind, kind)
