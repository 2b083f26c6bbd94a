"""`elude bench`: what things cost, measured alternately in one run."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console

bench = typer.Typer(
    help="Benchmarks: ratios of what is measured alternately, with 95 % intervals.", no_args_is_help=True
)


@bench.command("rewrite")
def rewrite(
    model: options.Model = None,
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    head: options.Head = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    layers: Annotated[list[str] | None, typer.Option(help="A layer to split; repeated.")] = None,
    subunits: Annotated[int, typer.Option(help="Sub-units a neuron.")] = 8,
    tokens: Annotated[int, typer.Option(help="Calibration tokens at each end of a neuron.")] = 400,
    max_images: Annotated[int | None, typer.Option(help="Use this many for the times.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="Rewrites, each between two plain passes; 0 for none.", min=0)] = 3,
    pairs: Annotated[int, typer.Option(help="Pairs of predictions, base and loaded; 0 for none.", min=0)] = 20,
    memory_images: Annotated[
        list[int] | None, typer.Option(help="Measure peak memory with this many images; repeated.", min=1)
    ] = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """The time of a rewrite in plain passes over the images, its peak memory, and the price of a served prediction."""
    from elude_runtime.offline import bench as measure
    from elude_runtime.partition import SplitConfig

    asked = options.ModelOptions(
        model, pretrained, weights, model_factory, tuple(model_arg or ()), head=head, input_size=input_size
    )
    base = asked.build()
    data = options.data_config(base.model, input_size, mean, std, interpolation, crop_pct, crop_mode)
    work = measure.Workload(images, data, layers, SplitConfig(subunits, tokens), batch_size, workers, max_images)
    found: dict[str, Any] = {"environment": measure.environment()}
    if rounds:
        console.print(f"{rounds} rewrites, each between two plain passes …")
        found["rewrite"] = measure.rewrite_time(base, work, rounds)
    if pairs:
        console.print(f"{pairs} pairs of predictions …")
        found["inference"] = measure.inference_ratio(base, work, pairs)
    if memory_images:
        console.print("Peak memory, each figure in a process of its own …")
        found["memory"] = measure.peak_memory(partial(asked.build), work, memory_images)
    print(json.dumps(found, indent=2)) if as_json else _show(found)


def _show(found: dict[str, Any]) -> None:
    from elude_runtime.offline.bench import Ratio

    facts = found["environment"]
    print(f"torch {facts['torch']}, {facts['threads']} threads on {facts['cores']} cores")
    if timed := found.get("rewrite"):
        print(f"rewrite of {timed['images']} images / plain pass over them: {Ratio(**timed['ratio'])}")
        print(f"  {timed['rewrite_seconds']} s / {timed['plain_seconds']} s; by stage:")
        for stage, seconds in timed["stages_seconds"].items():
            print(f"  {seconds:8.2f} s  {stage}")
    if inference := found.get("inference"):
        ratio = Ratio(**inference["ratio"])
        print(f"prediction by the loaded model / by the base model, batch of {inference['batch_size']}: {ratio}")
    if memory := found.get("memory"):
        print(f"peak memory, MiB (weights: {memory['weights_mib']})")
        for run in memory["runs"]:
            added = run["rewrite_mib"] - run["plain_mib"]
            print(
                f"  {run['images']:6} images: rewrite {run['rewrite_mib']}, a plain pass {run['plain_mib']}, "
                f"difference {added}"
            )
