"""`elude rewrite`: the offline step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console, print_skipped, stages


def rewrite(
    model: options.Model = None,
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The checkpoint directory to make.")] = ...,  # type: ignore[assignment]
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    head: options.Head = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names: one a line, or JSON; else the published weights' own.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="A layer to split; repeated. `elude layers` lists them.")
    ] = None,
    subunits: Annotated[int, typer.Option(help="Sub-units a neuron, half for each end.")] = 8,
    concepts: Annotated[
        int, typer.Option(help="Concepts a layer and token type, at most: no two alike.", min=1, max=65534)
    ] = 96,
    tokens: Annotated[int, typer.Option(help="Calibration tokens at each end of a neuron.")] = 400,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    save_every: Annotated[
        float,
        typer.Option(help="Seconds between saves of the progress; after a kill, the same command goes on.", min=0),
    ] = 60.0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing checkpoint, once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Rewrite a model's checkpoint into sub-units and concepts; its predictions stay what they are."""
    from elude_runtime.network.conditions import output_size
    from elude_runtime.offline.ranks import launched
    from elude_runtime.offline.rewrite import rewrite_checkpoint
    from elude_runtime.partition import SplitConfig

    config = SplitConfig(subunits, tokens, seed=seed)
    asked = options.ModelOptions(
        model, pretrained, weights, model_factory, tuple(model_arg or ()), head=head, input_size=input_size
    )
    chosen = asked.choose()
    base, notes = chosen.base, list(chosen.notes)
    data = options.data_config(base.model, input_size, mean, std, interpolation, crop_pct, crop_mode, notes)
    outputs = output_size(base.model, data.input_size)
    names = options.read_labels(labels, outputs if getattr(base.model, "num_classes", 1) else 0) or chosen.labels
    if asked.random:
        notes.append("The weights are random: give --pretrained or --weights for a model that knows something.")
    first = launched().first
    for note in notes if first else ():
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    try:
        with stages(visible=first) as bar:
            result = rewrite_checkpoint(
                base, images, out, config, layers=layers, concepts=concepts, batch_size=batch_size, workers=workers,
                max_images=max_images, device=device, data_config=data, labels=names, force=force,
                save_every=save_every, progress=bar,
            )  # fmt: skip
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):
            console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
        raise
    if not first:
        return
    manifest = result.manifest
    if as_json:
        skipped = [{"file": f, "reason": r} for f, r in result.skipped]
        facts = {"checkpoint": str(out), "checkpoint_sha256": manifest.checkpoint_sha256, "skipped": skipped}
        print(json.dumps({**facts, "layers": [e.model_dump() for e in manifest.layers]}, indent=2))
        return
    print_skipped(result.skipped)
    print(f"{out}: {manifest.calibration.images} images, checkpoint {manifest.checkpoint_sha256[:12]}")
    for entry in manifest.layers:
        parts = [
            f"{t.concepts} concepts on {t.name}" if t.live else f"{t.name} without effect" for t in entry.token_types
        ]
        errors = ", ".join(f"{m} {v:.2g}" for m, v in entry.attribution.completeness.items())
        print(f"  {entry.name}: {entry.neurons} neurons in up to {entry.subunits} sub-units each; {'; '.join(parts)}")
        print(f"    attribution by {entry.attribution.auto} (median relative completeness error: {errors})")
    print(f"Next: elude verify {out} with {images} and the same model and data options, then elude archive {out}")
