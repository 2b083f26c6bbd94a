"""`elude layers`: the split layers of an architecture, the default choice marked."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from elude_runtime.cli import model_options as options


def layers(
    model: options.Model = None,
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    input_size: options.InputSize = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are not offered, with the reason.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the layers that can be split, and why others cannot."""
    from elude_runtime.network.conditions import output_size
    from elude_runtime.network.split_layers import find_split_layers

    base = options.ModelOptions(
        model, pretrained, weights, model_factory, tuple(model_arg or ()), input_size=input_size
    ).build()
    config = options.data_config(base.model, input_size, None, None, None, None, None)
    output_size(base.model, config.input_size)
    found = find_split_layers(base.model, config.input_size)
    shown = [layer for layer in found if layer.offered or every]
    if as_json:
        print(json.dumps([asdict(layer) for layer in shown], indent=2))
        return
    table = Table(box=None, header_style="bold")
    for heading in ("", "layer", "kind", "neurons", "inputs", "tokens", "grid", "its output is"):
        table.add_column(
            heading, justify="right" if heading in ("neurons", "inputs") else "left", no_wrap=heading == "layer"
        )
    for layer in shown:
        kind = layer.kind + (f" {'x'.join(map(str, layer.kernel))}" if layer.kernel else "")
        types = ("patch", "class") if layer.layout.types == 2 else ("",)
        tokens = " + ".join(n if live else f"({n})" for n, live in zip(types, layer.live, strict=True))
        grid = "x".join(map(str, layer.layout.grid)) if layer.layout.grid else "-" if layer.offered else ""
        reason = layer.reason + (", weighted by attention or a gate" if layer.offered and layer.weighted else "")
        mark = "default" if layer.default else "" if layer.offered else "no"
        table.add_row(
            mark, layer.name, kind, str(layer.neurons), str(layer.inputs), tokens, grid, reason,
            style="bold green" if layer.default else None if layer.offered else "dim",
        )  # fmt: skip
    Console(width=max(Console().width, 120)).print(table)
    print(
        f"\n{sum(layer.offered for layer in found)} of {len(found)} linear layers are offered for splitting"
        f"{'' if every else '; --all shows the others with the reason'}. "
        "Tokens in brackets cannot change the output; without a grid (rows x columns) a layer has no heatmaps."
    )
