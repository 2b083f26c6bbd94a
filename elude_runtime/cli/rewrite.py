"""`elude rewrite`: the offline step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console, stages


def rewrite(
    model: options.Model = None,
    images: Annotated[Path, typer.Option(help="Folder of typical images; no labels needed.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The checkpoint directory to make.")] = ...,  # type: ignore[assignment]
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    labels: Annotated[Path | None, typer.Option(help="Class names: one a line, or JSON.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="A layer to split; repeated. `elude layers` lists them.")
    ] = None,
    subunits: Annotated[int, typer.Option(help="Sub-units a neuron, half for each end.")] = 8,
    concepts: Annotated[int, typer.Option(help="Concepts a layer and token type.", min=1, max=65534)] = 96,
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing checkpoint, once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Rewrite a model's checkpoint into sub-units and concepts; its predictions stay what they are."""
    from elude_runtime.errors import EludeError
    from elude_runtime.offline.rewrite import rewrite_checkpoint
    from elude_runtime.partition import SplitConfig

    config = SplitConfig(subunits, tokens, seed=seed)
    chosen = options.ModelOptions(model, pretrained, weights, model_factory, tuple(model_arg or ()))
    base = chosen.build()
    names = options.read_labels(labels)
    classes = getattr(base.model, "num_classes", None)
    if names is not None and classes and len(names) != classes:
        raise EludeError(f"{labels} names {len(names)} classes, the model has {classes}.")
    if chosen.random:
        console.print(
            "[yellow]The weights are random:[/] give --pretrained or --weights for a model that knows something."
        )
    data = options.data_config(base.model, input_size, mean, std, interpolation, crop_pct, crop_mode)
    with stages() as bar:
        result = rewrite_checkpoint(
            base, images, out, config, layers=layers, concepts=concepts, batch_size=batch_size, workers=workers,
            max_images=max_images, device=device, data_config=data, labels=names, force=force, progress=bar,
        )  # fmt: skip
    manifest = result.manifest
    if as_json:
        skipped = [{"file": f, "reason": r} for f, r in result.skipped]
        facts = {"checkpoint": str(out), "checkpoint_sha256": manifest.checkpoint_sha256, "skipped": skipped}
        print(json.dumps({**facts, "layers": [e.model_dump() for e in manifest.layers]}, indent=2))
        return
    for file, reason in result.skipped[:5]:
        console.print(f"[yellow]skipped[/] {file}: {reason}", highlight=False)
    if len(result.skipped) > 5:
        console.print(f"[yellow]skipped[/] {len(result.skipped)} images in all; --json names every one.")
    print(f"{out}: {manifest.calibration.images} images, checkpoint {manifest.checkpoint_sha256[:12]}")
    for entry in manifest.layers:
        parts = [
            f"{t.concepts} concepts on {t.name}" if t.live else f"{t.name} without effect" for t in entry.token_types
        ]
        errors = ", ".join(f"{m} {v:.2g}" for m, v in entry.attribution.completeness.items())
        print(f"  {entry.name}: {entry.neurons} neurons in up to {entry.subunits} sub-units each; {'; '.join(parts)}")
        print(f"    attribution by {entry.attribution.auto} (median relative completeness error: {errors})")
    print(f"Next: elude verify {out} with {images} and the same model and data options, then elude archive {out}")
