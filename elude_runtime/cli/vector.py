"""`elude vector`: what sets two groups of images apart at one layer; kept with the checkpoint as a named vector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import Stages, printer, stages
from elude_runtime.cli.progress import console as errors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elude_runtime.analysis.contrast import Contrast
    from elude_runtime.offline.images import ImageSource


def vector(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    positive: Annotated[str, typer.Option(help=f"Images that have it. {options.IMAGES}")] = ...,  # type: ignore[assignment]
    negative: Annotated[str, typer.Option(help="Images that do not, otherwise alike.")] = ...,  # type: ignore[assignment]
    layer: Annotated[str | None, typer.Option(help="A split layer; needed where there are several.")] = None,
    save: Annotated[str | None, typer.Option(metavar="NAME", help="Keep it with the checkpoint under a name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a vector of that name.")] = False,
    top: Annotated[int, typer.Option(help="Concepts that become edits, largest weight first.", min=1)] = 10,
    max_images: Annotated[int | None, typer.Option(help="Use this many of each side.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the features that images with something have more of than images without, to steer by."""
    from elude_runtime.analysis.contrast import contrast
    from elude_runtime.analysis.model import load
    from elude_runtime.checkpoint.vectors import FeatureShare, StoredVector, save_vector, vector_file
    from elude_runtime.errors import LayerError
    from elude_runtime.offline.images import ImageSource

    if save is not None:
        vector_file(checkpoint, save, force=force)  # before the work, not after it
    model = load(checkpoint, device, trust_factory=trust_factory)
    if layer is None:
        if len(model.layers) > 1:
            raise LayerError(f"The checkpoint splits {', '.join(model.layers)}; choose one with --layer.")
        layer = model.layers[0]
    model.state(layer)
    sources = {
        side: ImageSource(images, model.data_config, batch_size=batch_size, workers=workers, limit=max_images)
        for side, images in (("positive", positive), ("negative", negative))
    }
    with stages() as bar:
        with_it, without = (_batches(s, model.base, bar, f"{side} images") for side, s in sources.items())
        result = contrast(model, layer, with_it, without, top=top)
    path = None
    if save is not None:
        stored = StoredVector(
            name=save,
            layer=layer,
            partition_sha256=model.manifest.partition_sha256,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            direction=result.direction,
            edits=_edits(result),
            weights=[FeatureShare(feature=f.feature, weight=f.weight, share=f.share) for f in result.features],
            auc=result.auc,
            positive=result.positive,
            negative=result.negative,
        )
        path = save_vector(checkpoint, stored, force=force)
    for side, source in sources.items():
        if source.report.skipped:
            name, reason = source.report.skipped[0]
            skipped = f"{len(source.report.skipped)} {side} images could not be read, the first: {name}: {reason}"
            errors.print(skipped, highlight=False, soft_wrap=True, markup=False)
    if as_json:
        print(json.dumps(_document(result, path), allow_nan=False))
    else:
        _print(result, top, save, path)


def _batches(source: ImageSource, base: nn.Module, bar: Stages, stage: str) -> Iterator[Tensor]:
    parameter = next(base.parameters())
    for images in source.batches():
        yield images.to(parameter.device, parameter.dtype)
        bar(stage, len(images), source.count)


def _edits(result: Contrast) -> list[dict[str, Any]]:
    return [{"feature": e.feature, "mode": e.mode, "value": e.value} for e in result.edits]


def _document(result: Contrast, path: Path | None) -> dict[str, Any]:
    return {
        "layer": result.layer,
        "positive": result.positive,
        "negative": result.negative,
        "auc": result.auc,
        "features": [{"feature": f.feature, "weight": f.weight, "share": f.share} for f in result.features],
        "edits": _edits(result),
        "direction": [float(str(v)) for v in result.direction],  # the shortest text of a float32
        "saved": str(path) if path else None,
    }


def _print(result: Contrast, top: int, name: str | None, path: Path | None) -> None:
    console = printer()
    auc = "too few images to hold some out" if result.auc is None else f"AUC {result.auc:.3f} on images held out"
    console.print(f"[bold]{result.layer}[/]  {result.positive} positive, {result.negative} negative images; {auc}")
    shifts = {e.feature: e.value for e in result.edits}
    table = Table(box=None, header_style="bold")
    for heading in ("concept", "weight", "share", "edit"):
        table.add_column(heading, justify="left" if heading == "concept" else "right", no_wrap=True)
    for f in result.features[:top]:
        edit = f"add {shifts[f.feature]:+.3f}" if f.feature in shifts else "-"
        table.add_row(f.feature, f"{f.weight:+.2f}", f"{f.share:.1%}", edit)
    console.print(table)
    console.print(f"direction: {len(result.direction)} numbers, norm {float((result.direction**2).sum()) ** 0.5:.4g}")
    if path is None:
        console.print("Keep it with --save NAME, to steer by it.")
    else:
        console.print(f'Kept in {path}; steer by it with {{"vectors": [{{"name": "{name}"}}]}}.', markup=False)
