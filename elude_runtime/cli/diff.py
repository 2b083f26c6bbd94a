"""`elude diff`: which features of two rewrites correspond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elude_runtime.cli.progress import console as errors
from elude_runtime.cli.progress import printer, stages

if TYPE_CHECKING:
    from elude_runtime.offline.correspondence import Correspondence, Diff, Regrouping
_MARKS = {
    "matched": "",
    "weak": "[yellow]weak[/]",
    "only_old": "[red]only old[/]",
    "only_new": "[red]only new[/]",
    "dead": "[dim]dead[/]",
}


def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The checkpoint whose features have names.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The checkpoint that names are to move to.")],
    images: Annotated[
        str, typer.Option(help="Images that both are run on: a folder, a list of files (.txt), or tar shards.")
    ] = ...,  # type: ignore[assignment]
    threshold: Annotated[float, typer.Option(help="Correlation from which features correspond.")] = 0.7,
    top: Annotated[int, typer.Option(help="Concepts shown a layer and token type, largest share first.", min=1)] = 10,
    show_all: Annotated[bool, typer.Option("--all", help="Show every concept.")] = False,
    concepts_only: Annotated[bool, typer.Option("--concepts-only", help="Leave out the sub-units.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the whole mapping: FILE.csv, .parquet or .json.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Write OLD's labels, carried to NEW: FILE.csv.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoints carry.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Match the features of two rewrites by the correlation of their activations, so that names can move."""
    from elude_runtime.checkpoint.labels import write_labels
    from elude_runtime.errors import StorageError
    from elude_runtime.offline.correspondence import check_ending, write_mapping
    from elude_runtime.offline.diff import diff as run

    # before the work, not after it
    if out is not None:
        check_ending(out)
    for file in (out, labels):
        if file is not None and not file.absolute().parent.is_dir():
            raise StorageError(f"There is no folder {file.parent} for {file.name}; make it, or choose another.")
    with stages() as bar:
        result = run(
            old, new, images, threshold=threshold, subunits=not concepts_only, batch_size=batch_size, workers=workers,
            limit=max_images, device=device, trust_factory=trust_factory, progress=bar,
        )  # fmt: skip
    if out is not None:
        write_mapping(out, result)
    carried = result.carried_labels()
    if labels is not None:
        write_labels(labels, carried)
    if as_json:
        print(json.dumps(result.document(), indent=2, allow_nan=False))
    else:
        _print(result, None if show_all else top)
    if out is not None:
        errors.print(f"{out}: {len(result.mapping)} rows", highlight=False, soft_wrap=True)
    if labels is not None:
        left = sum(bool(r.label) for r in result.mapping) - len(carried)
        why = f", {left} left behind: no match, not each other's best, or no better than by chance" if left else ""
        errors.print(f"{labels}: {len(carried)} labels carried{why}", highlight=False, soft_wrap=True)


def _print(result: Diff, top: int | None) -> None:
    screen = printer()
    for side in ("old", "new"):
        facts = getattr(result, side)
        method = ", ".join(
            f"{k} {facts['method'][k]}" for k in ("subunits", "concepts", "seed") if k in facts["method"]
        )
        screen.print(
            f"[bold]{side}[/]  {escape(facts['checkpoint'])}  {facts['model']}, base {facts['base_sha256'][:12]}, "
            f"{method}, {facts['calibration_images']} calibration images"
        )
    same = "the same base model" if result.same_base else "[yellow]different base models[/]"
    screen.print(f"{result.images} images, {same}")
    for warning in result.warnings:
        errors.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)
    for name, layers in (("old", result.only_old), ("new", result.only_new)):
        if layers:
            screen.print(f"only the {name} one splits {', '.join(layers)}")
    for layer, reason in result.incomparable.items():
        screen.print(f"[yellow]{layer} cannot be compared:[/] {reason}")
    _print_agreement(screen, result)
    for layer, token_type in dict.fromkeys((a.layer, a.token_type) for a in result.agreement):
        rows = [r for r in result.mapping if r.kind == "concept" and (r.layer, r.token_type) == (layer, token_type)]
        _print_rows(screen, rows, top, f"{layer}, {token_type}")
    _print_regroupings(screen, result.splits, "Splits: one old concept in several new ones", top)
    _print_regroupings(screen, result.merges, "Merges: several old concepts in one new one", top)


def _print_agreement(screen: Console, result: Diff) -> None:
    reached = f"r ≥ {result.threshold:g}".replace("0.", ".")
    for layer in dict.fromkeys(a.layer for a in result.agreement):
        screen.print(f"\n[bold]{layer}[/]")
        table = _table("tokens", "features", "old>", "new>", "mean r>", f"{reached}>", "share>", "mutual>", "random r>")
        for a in (a for a in result.agreement if a.layer == layer):
            table.add_row(
                f"{a.token_type} {a.tokens}", f"{a.kind}s", str(a.old), str(a.new), _number(a.mean),
                _percent(a.matched_fraction), _percent(a.matched_share), _percent(a.mutual / a.old if a.old else None),
                _number(a.random_mean),
            )  # fmt: skip
        screen.print(table)
    screen.print(
        f"[dim]{reached}: of the old features those matched; share: of the output's variance, theirs\n"
        "mutual: of the old features those matched in which each is the other's best\n"
        "random r: mean r against random members of the same sizes[/]"
    )


def _print_rows(screen: Console, rows: list[Correspondence], top: int | None, title: str) -> None:
    rows = sorted(rows, key=lambda r: (r.old is None, -(r.old_share or 0.0), -(r.new_share or 0.0)))
    shown = rows[:top]
    more = f" (the {len(shown)} with the largest share, of {len(rows)}; --all shows every one)"
    screen.print(f"\n[bold]{title}[/]{more if len(shown) < len(rows) else ''}")
    table = _table(
        "old", "new", "r>", "runner-up", "r>", "rival", "r>", "old\nshare>", "new\nshare>", "", "label",
    )  # fmt: skip
    for r in shown:
        table.add_row(
            _short(r.old), _short(r.new), _number(r.correlation), _short(r.runner_up), _number(r.runner_up_correlation),
            _short(r.rival), _number(r.rival_correlation), _percent(r.old_share), _percent(r.new_share),
            _MARKS[r.status], escape(r.label) or "-",
        )  # fmt: skip
    screen.print(table)


def _table(*headings: str) -> Table:
    """A table without lines; a heading that ends in > stands over numbers."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(
            heading.removesuffix(">"), justify="right" if heading.endswith(">") else "left", no_wrap=True,
            vertical="bottom",
        )  # fmt: skip
    return table


def _print_regroupings(screen: Console, found: list[Regrouping], title: str, top: int | None) -> None:
    if not found:
        return
    screen.print(f"\n[bold]{title}[/]")
    for one in found[:top]:
        parts = ", ".join(f"{_short(p)} {r:.2f}" for p, r in zip(one.parts, one.correlations, strict=True))
        screen.print(f"  {one.whole}: {parts}; together {one.together:.2f}")
    if top is not None and len(found) > top:
        screen.print(f"  … and {len(found) - top} more; --all shows every one")


def _short(feature: str | None) -> str:
    """The feature's name without its layer, which the heading names."""
    return feature.rpartition("/")[2] if feature else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
