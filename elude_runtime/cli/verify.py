"""`elude verify`: the certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import stages

if TYPE_CHECKING:
    from elude_runtime.offline.verify import Verification


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    images: Annotated[str, typer.Option(help=f"{options.IMAGES} The calibration images also prove the means.")] = ...,  # type: ignore[assignment]
    base: Annotated[
        str | None, typer.Option(help="The base model's timm name; leave out with --model-factory.")
    ] = None,
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    head: options.Head = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to compare at.")] = "1,8",
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …: where both models run.")] = "cpu",
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compare the outputs under torch.compile too; takes minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prove that a checkpoint changes nothing, against its base model rebuilt from its own source."""
    from elude_runtime.errors import EludeError
    from elude_runtime.network.conditions import output_size
    from elude_runtime.offline.verify import verify as run

    try:
        sizes = tuple(sorted({int(s) for s in batch_sizes.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise EludeError(f"--batch-sizes takes numbers with commas, not {batch_sizes!r}.")
    model = (
        options.ModelOptions(
            base, pretrained, weights, model_factory, tuple(model_arg or ()), head=head, input_size=input_size
        )
        .build()
        .model
    )
    data = options.data_config(model, input_size, mean, std, interpolation, crop_pct, crop_mode)
    output_size(model, data.input_size)  # a sentence, where the base model does not run or answers with no tensor
    with stages() as bar:
        result = run(
            checkpoint,
            model,
            data,
            images,
            batch_sizes=sizes,
            limit=max_images,
            device=device,
            trust_factory=trust_factory,
            compiled=compiled,
            progress=bar,
        )
    if as_json:
        print(json.dumps(result.document(), indent=2))
    else:
        print_checks(result)
    if not result.holds:
        raise typer.Exit(1)


def print_checks(result: Verification) -> None:
    """One line a check, and what they come to."""
    console = Console(highlight=False)
    for check in result.checks:
        mark = {True: "[green]holds[/]", False: "[bold red]FAILS[/]", None: "[yellow]  -  [/]"}[check.holds]
        console.print(f"  {mark}  {check.name:<15} {check.detail}", soft_wrap=True)
    left = [c.name for c in result.checks if c.holds is None]
    skipped = f" ({', '.join(left)} not checked)" if left else ""
    verdict = (
        f"[bold green]Every check holds{skipped}.[/]"
        if result.holds
        else "[bold red]The checkpoint is not lossless.[/]"
    )
    console.print(f"{verdict} Written to verification.json.")
