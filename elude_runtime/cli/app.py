"""The command table."""

from __future__ import annotations

from typing import Annotated

import typer

import elude_runtime
from elude_runtime.cli.activations import activations
from elude_runtime.cli.archive import archive
from elude_runtime.cli.bench import bench
from elude_runtime.cli.catalogue import catalogue
from elude_runtime.cli.demo import demo
from elude_runtime.cli.diff import diff
from elude_runtime.cli.evaluate import evaluate
from elude_runtime.cli.explain import explain
from elude_runtime.cli.explore import explore
from elude_runtime.cli.exporter import exporter
from elude_runtime.cli.health import health
from elude_runtime.cli.inspect import inspect
from elude_runtime.cli.label import label
from elude_runtime.cli.layers import layers
from elude_runtime.cli.policy import policy
from elude_runtime.cli.report import report
from elude_runtime.cli.rewrite import rewrite
from elude_runtime.cli.search import search
from elude_runtime.cli.serve import serve
from elude_runtime.cli.steer import steer
from elude_runtime.cli.vector import vector
from elude_runtime.cli.verify import verify

app = typer.Typer(
    help="Make a timm model's inner features visible and steerable, with every prediction unchanged.",
    epilog="Exit codes: 0 done, 1 a check did not hold, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    demo, layers, rewrite, verify, catalogue, inspect, search, label, explain, steer, vector, activations, diff,
    evaluate, report, explore, archive, serve, health, exporter,
)  # fmt: skip
for command in COMMANDS:
    app.command(command.__name__)(command)
app.add_typer(policy, name="policy")
app.add_typer(bench, name="bench")


def _version(value: bool) -> None:
    if value:
        print(elude_runtime.__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass
