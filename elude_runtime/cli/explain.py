"""`elude explain`: which features carried the decision on one image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from elude_runtime.cli import one_image as one
from elude_runtime.cli.progress import printer
from elude_runtime.errors import EludeError

if TYPE_CHECKING:
    from elude_runtime.api.schema.reply import ExplanationReply, LayerReply


def explain(
    image: one.ImageFile,
    checkpoint: one.Checkpoint = ...,  # type: ignore[assignment]
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="top1, top:N, a class INDEX or LABEL, INDEX:VERSUS, or direction:FILE (.npy or a JSON list) for a "
            "model without classes; repeated.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="auto, gradient, integrated_gradients or ablation.")] = "auto",
    steps: Annotated[int, typer.Option(help="Nodes of integrated gradients.")] = 4,
    layer: Annotated[list[str] | None, typer.Option(help="Default: all split layers; repeated.")] = None,
    level: Annotated[str, typer.Option(help="concepts or subunits.")] = "concepts",
    top: Annotated[int, typer.Option(help="Features listed.")] = 10,
    sign: Annotated[str, typer.Option(help="both, positive or negative.")] = "both",
    effects: Annotated[
        bool,
        typer.Option("--effects", help="Also ablate each listed feature: its true effect, beside its attribution."),
    ] = False,
    pixels: Annotated[bool, typer.Option("--pixels", help="Also where in the image each activation rests.")] = False,
    edit: one.Edits = None,
    vector: one.Vectors = None,
    policy: one.Policies = None,
    multiplier: one.Multiplier = 1.0,
    conflict: one.Conflict = "error",
    png: one.Drawn = None,
    device: one.Device = "auto",
    trust_factory: one.TrustFactory = False,
    as_json: one.AsJson = False,
) -> None:
    """Explain an image's prediction; with edits, the steered one beside it."""
    wish: dict[str, Any] = {
        "targets": [parse_target(text) for text in target or ["top1"]],
        "method": method,
        "steps": steps,
        "layers": layer,
        "level": level,
        "top_features": top,
        "sign": sign,
        "heatmaps": "none" if png is None else "values",
        "effects": effects,
        "pixels": pixels,
    }
    steer = one.steer_document(edit, vector, policy, multiplier, conflict)
    asked = one.Asked(image, checkpoint, device=device, trust_factory=trust_factory)
    reply, text = asked.ask({"explain": wish, "steer": steer})
    if png is not None:
        asked.draw(reply, steer, png)
    if as_json:
        print(text)
        return
    out = printer()
    one.print_head(out, image, reply)
    for explanation in reply.explanations or []:
        _print_explanation(out, explanation, "")
    if reply.steered is not None:
        one.print_steered(out, reply)
        for explanation in reply.steered.explanations or []:
            _print_explanation(out, explanation, "steered: ")
    if png is not None:
        out.print(f"\nDrawn to {png}.")


def parse_target(text: str) -> Any:
    """A target as the command line names it, as the API does. EludeError for a file that holds no direction.

    `label:TEXT` is the class of that name even where TEXT looks like another form.
    """
    if text == "top1":
        return "top1"
    if match := re.fullmatch(r"top:(\d{1,9})", text):
        return {"top": int(match[1])}
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        return {"index": int(match[1]), "versus": int(match[2])}
    kind, _, rest = text.partition(":")
    if kind == "direction":
        return {"direction": _direction(Path(rest))}
    return {"label": rest if kind == "label" else text}


def _direction(file: Path) -> list[float]:
    import numpy as np

    try:
        if file.suffix == ".npy":
            numbers = np.load(file, allow_pickle=False)
        else:
            numbers = np.array(json.loads(file.read_text(encoding="utf-8")))
        numbers = numbers.astype(np.float64, casting="safe")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise EludeError(f"The direction {file} cannot be read; give a .npy file or a JSON list of numbers.") from error
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise EludeError(f"The direction {file} must be one row of finite numbers, as many as the model's output has.")
    return [float(v) for v in numbers]


def _print_explanation(out: Console, explanation: ExplanationReply, prefix: str) -> None:
    target = explanation.target
    what = "direction" if target.direction else one.class_name(target.index, target.label)
    against = f" against class {target.versus}" if target.versus is not None else ""
    out.print(f"\n{prefix}[bold]{one.plain(what)}[/]{against}: {explanation.value:.4g}")
    for layer in explanation.layers:
        _print_layer(out, layer, explanation.value)


def _print_layer(out: Console, layer: LayerReply, value: float) -> None:
    facts = [f"{layer.method}, baseline {layer.baseline:.4g}, to explain {value - layer.baseline:+.4g}"]
    if layer.completeness_error is not None:
        facts.append(f"completeness error {layer.completeness_error:+.2g}")
    if layer.edit_attribution is not None:
        facts.append(f"the edits themselves {layer.edit_attribution:+.4g}")
    out.print(f"[bold]{one.plain(layer.layer)}[/]  {', '.join(facts)}")
    if not layer.features:
        out.print("  no feature of this sign")
        return
    measured = any(f.effect is not None for f in layer.features)
    headings = ["feature", "attribution", "activation", "token", *(["effect", "error"] if measured else []), "label"]
    made = one.table(*headings, left=("feature", "label"))
    for f in layer.features:
        cells = [one.plain(f.feature), f"{f.attribution:+.4f}", f"{f.activation:.3g}", str(f.token)]
        if measured:
            cells += ["-" if v is None else f"{v:+.4f}" for v in (f.effect, f.ablation_error)]
        made.add_row(*cells, one.plain(f.label or "-"))
    out.print(made)
