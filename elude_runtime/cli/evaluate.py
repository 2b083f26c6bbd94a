"""`elude evaluate`: how clear a checkpoint's features are, beside what others would find in the same layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.evaluate_effects import figure, print_effects, print_properties, table_of
from elude_runtime.cli.progress import console, printer, stages

if TYPE_CHECKING:
    from elude_runtime.offline.evaluation.baselines import BaselineOptions
    from elude_runtime.offline.evaluation.encoders import Encoder
    from elude_runtime.offline.evaluation.estimates import Estimate
    from elude_runtime.offline.evaluation.evaluation import Evaluation
    from elude_runtime.offline.evaluation.result import LayerResult


_KEPT_BYTES = 256 << 20  # freed memory that the many passes use again


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="A timm model that judges, with its hub weights or --encoder-weights; repeated. Or 'pixels'."
        ),
    ] = None,
    encoder_weights: Annotated[
        list[Path] | None, typer.Option(help="Local weights of the encoders, in their order.")
    ] = None,
    encoder_factory: Annotated[
        list[str] | None, typer.Option(metavar="FILE.py:FUNCTION", help="Builds an encoder; repeated. Code that runs.")
    ] = None,
    layers: Annotated[list[str] | None, typer.Option(help="A split layer; repeated. Default: all.")] = None,
    neurons: Annotated[int, typer.Option(help="Neurons, drawn at random, whose sub-units are scored.", min=1)] = 100,
    calibration: Annotated[
        str | None, typer.Option(help="Images to train baselines on; default: those of --images that are not scored.")
    ] = None,
    baselines: Annotated[str, typer.Option(help="all, none, or names with commas.")] = "all",
    truth: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help='Known properties: {"striped": ["a.png", "b.png"]}; AUC of each.'),
    ] = None,
    class_groups: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help='Classes steered together: {"dogs": [151, "beagle"]}, indices or labels.'
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Of the bootstrap.", min=2)] = 200,
    effect_images: Annotated[
        int,
        typer.Option(
            help="Images on which features are taken out and steered, of a class group twice as many; 0 for none.",
            min=0,
        ),
    ] = 24,
    stability: Annotated[
        bool,
        typer.Option("--stability/--no-stability", help="Rewrite the model from halves of the calibration images."),
    ] = True,
    random_network: Annotated[
        bool,
        typer.Option(
            "--random-network/--no-random-network", help="Rewrite and score the same architecture with random weights."
        ),
    ] = True,
    fidelity_images: Annotated[
        int, typer.Option(help="Images on which reconstructions take the layer's place; 0 for none.", min=0)
    ] = 100,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.", min=0)] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json.")] = False,
) -> None:
    """Score features on images that calibrated nothing: clarity, stability, faithfulness, against all baselines."""
    from elude_runtime.api.memory import keep_freed
    from elude_runtime.offline.evaluation.options import EvaluateOptions
    from elude_runtime.offline.evaluation.plots import need_matplotlib
    from elude_runtime.offline.evaluation.run import evaluate as run

    need_matplotlib()  # before the work, not after it
    keep_freed(_KEPT_BYTES)

    wanted = EvaluateOptions(
        neurons, _baselines(baselines), draws, effect_images, stability, random_network, fidelity_images, seed=seed
    )
    judges = _encoders(encoder or [], encoder_weights or [], encoder_factory or [])
    with stages() as bar:
        result = run(
            checkpoint, images, judges, wanted, calibration=calibration, layers=layers, batch_size=batch_size,
            workers=workers, limit=max_images, device=device, trust_factory=trust_factory,
            truth=_truth(truth), groups=_groups(class_groups), progress=bar,
        )  # fmt: skip
        files = result.write(checkpoint)
    for warning in result.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result.document(), indent=2, allow_nan=False))
    else:
        _print(result)
    _print_seconds(result.facts["seconds"])
    console.print(
        f"{files[0]}, and {len(files) - 1} plots in {checkpoint / 'evaluation'}", highlight=False, soft_wrap=True
    )


def _truth(file: Path | None) -> dict[str, list[str]]:
    """SettingsError for a file that does not name files by property."""
    hint = 'does not name files by property; write {"striped": ["a.png", "b.png"]}.'
    return _lists(file, hint, lambda x: isinstance(x, str))


def _groups(file: Path | None) -> dict[str, list[int | str]]:
    """SettingsError for a file that does not name classes by group."""
    hint = 'does not name classes by group; write {"dogs": [151, "beagle"]}.'
    return _lists(file, hint, lambda x: isinstance(x, int | str) and not isinstance(x, bool))


def _lists(file: Path | None, hint: str, fits: Callable[[object], bool]) -> dict[str, list[Any]]:
    """{name: list} of a JSON file; SettingsError with the hint for another content."""
    from elude_runtime.errors import SettingsError

    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict) or not all(isinstance(v, list) and all(map(fits, v)) for v in values.values()):
        raise SettingsError(f"{file} {hint}")
    return values


def _baselines(text: str) -> BaselineOptions | None:
    from elude_runtime.offline.evaluation.baselines import BaselineOptions

    if text == "none":
        return None
    return (
        BaselineOptions() if text == "all" else BaselineOptions(tuple(n.strip() for n in text.split(",") if n.strip()))
    )


def _encoders(names: list[str], weights: list[Path], factories: list[str]) -> list[Encoder]:
    """SettingsError where weights and encoders do not belong together."""
    from elude_runtime.errors import SettingsError
    from elude_runtime.offline.evaluation.encoders import PIXELS, EncoderChoice

    takers = [n for n in names if n != PIXELS]
    if weights and len(weights) != len(takers):
        raise SettingsError(
            f"{len(weights)} files with --encoder-weights do not fit {len(takers)} encoders; give one for each, in "
            "their order."
        )
    files = dict(zip(takers, weights, strict=False))
    made = [EncoderChoice(name, files.get(name)).build() for name in names]
    return [*made, *(EncoderChoice(factory=factory).build() for factory in factories)]


def _print(result: Evaluation) -> None:
    screen = printer()
    images = result.facts["images"]
    screen.print(
        f"{images['scored']} images scored, {images['calibration']} for the baselines; left out: "
        f"{images['excluded_checkpoint_calibration']} that the checkpoint was calibrated on, "
        f"{images['excluded_baseline_calibration']} of the calibration folder, {images['excluded_twice']} copies"
    )
    for layer in result.layers:
        _print_layer(layer)
    screen.print(f"\n{result.statement}")


def _print_seconds(seconds: Mapping[str, float]) -> None:
    """One line, the longest phase first, without those that hardly count."""
    total = seconds["total"]
    phases = [(name, s) for name, s in seconds.items() if name != "total" and s >= total / 100]
    parts = ", ".join(f"{name} {s:.0f}" for name, s in sorted(phases, key=lambda phase: -phase[1]))
    console.print(f"{total:.0f} seconds: {parts}", highlight=False, soft_wrap=True)


def _print_layer(layer: LayerResult) -> None:
    from elude_runtime.offline.evaluation.encoders import PIXELS

    screen = printer()
    screen.print(f"\n[bold]{layer.layer}[/], {layer.tokens}, {layer.calibration_tokens} calibration tokens")
    columns = [(j.name, m) for j in layer.judges for m in j.ceiling]
    judged = [j.name for j in layer.judges if j.name != PIXELS] or [PIXELS]
    headings = ("", "lossless", "top-1\nkept", "live", "dup.", *(f"{j}\n{m}" for j, m in columns))
    table = table_of("features", *headings, *(f"{j}\nintruder" for j in judged))
    first = layer.judges[0].name
    for one in sorted(layer.sets, key=lambda s: -_sortable(s.clarity[first].averages["img9"]["weighted"])):
        fvu = one.set.facts.get("fvu_output")
        table.add_row(
            one.name, str(len(one.set.share)), "yes" if one.set.lossless else "no" if fvu is None else f"FVU {fvu:.2f}",
            "-" if one.top1_kept is None else f"{one.top1_kept.value:.0%}",
            f"{float(one.live.float().mean()):.0%}", f"{float(one.duplicates.float().mean()):.0%}",
            *(figure(one.clarity[j].averages[m]["weighted"]) for j, m in columns),
            *(figure(one.clarity[j].averages["intruder"]["weighted"], 2) for j in judged),
        )  # fmt: skip
    screen.print(table)
    ceilings = ", ".join(f"{j.name} {m} {c:.2f}" for j in layer.judges for m, c in j.ceiling.items())
    screen.print(f"[dim]weighted by share of variance over both ends, with 95 % intervals; ceilings: {ceilings}[/]")
    screen.print(
        "[dim]intruder: how often the encoder names the odd one out of 4 exemplars and 1 other image, chance 0.20"
        f"{_kept(layer)}[/]"
    )
    for name, entry in layer.stability.items():
        screen.print(
            f"stability of {name} between rewrites from disjoint halves of the calibration images: matched correlation "
            f"{_plain(entry['matched_correlation'])} (random partition {_plain(entry['random'])}), ARI of the edges "
            f"{_plain(entry['ari_of_edges'])} ({_plain(entry['ari_random'])})"
        )
    for name in layer.sets[0].auc:
        best = sorted(((_or_less(s.auc[name].reported), s.name) for s in layer.sets), reverse=True)[:5]
        told = ", ".join(f"{own} {value:.3f}" for value, own in best)
        screen.print(f"AUC of {name}, chosen on half of the images and reported on the others: {told}")
    if layer.properties is not None:
        print_properties(layer.properties)
    print_effects(layer)


def _kept(layer: LayerResult) -> str:
    images = [one.top1_kept.images for one in layer.sets if one.top1_kept is not None]
    return f"; top-1 kept: with the features' own sum in the layer's place, {images[0]} images" if images else ""


def _sortable(figure: Estimate) -> float:
    return _or_less(figure.value)


def _or_less(value: float) -> float:
    return value if value == value else -1.0


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
