"""`elude bench`: what things cost, measured alternately in one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.bench_serve import serve
from elude_runtime.cli.progress import console, stages

bench = typer.Typer(
    help="Benchmarks: ratios of what is measured alternately, with 95 % intervals.", no_args_is_help=True
)
bench.command("serve")(serve)


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


@bench.command("api")
def api(
    model: Annotated[
        str | None,
        typer.Argument(metavar="CKPT|MODEL", help="A checkpoint, or a timm name to rewrite for this."),
    ] = None,
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    layers: Annotated[list[str] | None, typer.Option(help="A split layer; repeated. Default: all.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of a plain and another request, each kind and layer.", min=1)] = 40,
    max_images: Annotated[int, typer.Option(help="Use this many, spread over the folder.", min=1)] = 16,
    captum_pairs: Annotated[int, typer.Option(help="Pairs with Captum's methods, 50 steps; 0 for none.", min=0)] = 5,
    captum_batch: Annotated[int, typer.Option(help="Steps of Captum that share a pass.", min=1)] = 10,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's own choice.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    pretrained: options.Pretrained = False,
    weights: options.Weights = None,
    head: options.Head = None,
    model_factory: options.FactoryOption = None,
    model_arg: options.ModelArg = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Explaining and steering a single image, as multiples of a plain prediction, with the bounds they should keep."""
    from elude_runtime.offline.bench_api import Workbench, measure_api

    asked = options.ModelOptions(
        model, pretrained, weights, model_factory, tuple(model_arg or ()), head=head, input_size=input_size
    )
    how = (input_size, mean, std, interpolation, crop_pct, crop_mode)
    with _checkpoint(asked, images, layers, max_images, how) as checkpoint, stages() as bar:
        bench = Workbench(
            checkpoint,
            images,
            max_images,
            threads=threads,
            device=device,
            trust_factory=trust_factory or bool(model_factory),
        )
        found = measure_api(
            bench, layers, pairs=pairs, captum_pairs=captum_pairs, internal_batch=captum_batch, progress=bar
        )
    print(json.dumps(found, indent=2)) if as_json else _show_api(found)


@bench.command("attribution")
def attribution(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that `elude rewrite` made.")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    layers: Annotated[list[str] | None, typer.Option(help="A split layer; repeated. Default: all.")] = None,
    max_images: Annotated[int, typer.Option(help="Use this many, spread over the folder.", min=1)] = 100,
    top: Annotated[int, typer.Option(help="Features of a set.", min=2)] = 10,
    paired: Annotated[int, typer.Option(help="Top concepts whose pairs are ablated.", min=2)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the random features.")] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Attributions beside the true effects of ablation, image by image; and whether top concepts interact."""
    from elude_runtime.analysis.model import load
    from elude_runtime.offline.bench_attribution import measure_attribution
    from elude_runtime.offline.images import ImageSource

    model = load(checkpoint, device, trust_factory=trust_factory)
    source = ImageSource(images, model.data_config, batch_size=batch_size, limit=max_images)
    with stages() as bar:
        bar("images", 0, source.count)
        found = measure_attribution(model, source.batches(), layers, top=top, paired=paired, seed=seed, progress=bar)
    found = {"checkpoint_sha256": model.manifest.checkpoint_sha256, **found}
    print(json.dumps(found, indent=2)) if as_json else _show_attribution(found)


@bench.command("explore")
def explore(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that `elude rewrite` made.")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    pairs: Annotated[int, typer.Option(help="Pairs of a plain prediction and a slider's question.", min=1)] = 200,
    max_images: Annotated[int, typer.Option(help="Use this many, spread over the folder.", min=1, max=8)] = 8,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """A slider's answer in the explorer, as multiples of a plain prediction, both from a TorchServe that it starts."""
    from elude_runtime.cli.explore import own_server
    from elude_runtime.explore.app import Explorer
    from elude_runtime.explore.material import Material
    from elude_runtime.explore.measure import slider_time
    from elude_runtime.explore.served import ServedModel
    from elude_runtime.network.preprocessing import DataConfig
    from elude_runtime.offline.images import ImageSource

    material = Material(checkpoint)
    source = ImageSource(images, DataConfig.parse(material.manifest.data_config))
    encoded = list(source.encoded(max_images))
    with TemporaryDirectory() as folder, own_server(material, Path(folder), "m", trust_factory=trust_factory) as server:
        server.wait_ready()
        served = ServedModel(server.url, "m", material.manifest.checkpoint_sha256, token=server.token())
        pages = Path(folder) / "pages"
        pages.mkdir()
        (pages / "explore.html").touch()
        with stages() as bar:
            found = slider_time(Explorer(served, material, pages, "bench"), server.token(), encoded, pairs, bar)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from elude_runtime.offline.bench import Ratio

    print(f"plain prediction {found['plain_ms']} ms, slider's answer {found['slider_ms']} ms (medians)")
    print(f"slider's answer: {Ratio(**found['ratio'])} plain predictions")


@bench.command("report")
def report(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, with its catalogue.")],
    features: Annotated[int, typer.Option(help="Features in the gallery that is searched, at least.", min=1)] = 12_000,
    rounds: Annotated[int, typer.Option(help="Times that each page is opened and each text typed.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """The size of a report, the time to open its pages, and of a keystroke in the search, in headless Chromium."""
    from elude_runtime.offline.bench_report import measure_report

    with stages() as bar:
        found = measure_report(checkpoint, features, rounds, progress=bar)
    print(json.dumps(found, indent=2)) if as_json else _show_report(found)


@bench.command("catalogue")
def catalogue(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that `elude rewrite` made.")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    layers: Annotated[list[str] | None, typer.Option(help="A split layer; repeated. Default: all.")] = None,
    effect_images: Annotated[int, typer.Option(help="As for `elude catalogue`.", min=0)] = 8,
    rounds: Annotated[int, typer.Option(help="Catalogues, each between two plain passes.", min=1)] = 3,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """The time of a catalogue beside two plain passes over the images, with the bound it should keep."""
    from elude_runtime.offline.bench import environment
    from elude_runtime.offline.catalogue.bench import catalogue_time
    from elude_runtime.offline.catalogue.run import CatalogueOptions

    console.print(f"{rounds} catalogues, each between two plain passes …")
    wanted = CatalogueOptions(effect_images=effect_images)
    found = catalogue_time(
        checkpoint, images, wanted, layers, rounds, batch_size=batch_size, workers=workers, limit=max_images,
        trust_factory=trust_factory,
    )  # fmt: skip
    found = {"environment": environment(), **found}
    print(json.dumps(found, indent=2)) if as_json else _show_catalogue(found)


@contextmanager
def _checkpoint(
    asked: options.ModelOptions, images: str, layers: list[str] | None, count: int, how: tuple[Any, ...]
) -> Iterator[Path]:
    """The checkpoint that was named, or one of the named model, made of a few images and gone afterwards."""
    if asked.name and (Path(asked.name) / "elude.json").is_file():
        yield Path(asked.name)
        return
    from elude_runtime.offline.bench import Workload
    from elude_runtime.partition import SplitConfig

    base = asked.build()
    work = Workload(images, options.data_config(base.model, *how), layers, SplitConfig(), limit=count)
    with TemporaryDirectory() as folder:
        with stages() as bar:
            work.rewrite(base, Path(folder) / "ckpt", bar)
        yield Path(folder) / "ckpt"


def _show_api(found: dict[str, Any]) -> None:
    from elude_runtime.offline.bench import Ratio

    facts, plain = found["environment"], found["plain_ms"]
    print(f"torch {facts['torch']}, {facts['threads']} threads on {facts['cores']} cores, {found['images']} images")
    print(f"plain: {plain['request']} ms a request, {plain['model']} ms of it in the model; below, multiples of it")
    for entry in found["layers"]:
        print(f"{entry['layer']}: tail t = {Ratio(**entry['tail_share'])} of a forward pass")
        for cost in entry["kinds"]:
            print(f"  {cost['kind']}: at most {cost['bound']:.3f}")
            for side in ("request", "model"):
                figures = dict(cost[side])
                verdict = "met" if figures.pop("met") else "NOT met"
                print(f"    {side:8} {Ratio(**figures)}  {verdict}")
        if "captum_layer_ig" in entry:
            print(f"  Captum LayerIntegratedGradients, 50 steps: {Ratio(**entry['captum_layer_ig'])}")
    if "captum_pixel_ig" in found:
        print(f"Captum IntegratedGradients of the pixels, 50 steps: {Ratio(**found['captum_pixel_ig'])}")


def _show_report(found: dict[str, Any]) -> None:
    print(
        f"{found['features']:,} features, {found['images']:,} images: {found['megabytes']:.1f} MB, written in "
        f"{found['seconds_to_write']:.1f} s; Chromium {found['browser']}"
    )
    for name, times in found["pages_ms"].items():
        print(f"  {name:14} usable after {times['median']:.0f} ms (median; largest {times['largest']:.0f})")
    gallery = found["gallery"]
    times, keys = gallery["opening_ms"], gallery["keystroke_ms"]
    print(
        f"gallery of {gallery['features']:,} features: usable after {times['median']:.0f} ms (largest "
        f"{times['largest']:.0f})"
    )
    print(
        f"  a keystroke: {keys['script_median']:.0f} ms in scripts (largest {keys['script_largest']:.0f}), "
        f"{keys['shown_median']:.0f} ms until it is on the screen (largest {keys['shown_largest']:.0f}), "
        f"{keys['keystrokes']} keystrokes"
    )


def _show_attribution(found: dict[str, Any]) -> None:
    from elude_runtime.offline.evaluation.attribution_effects import Summary

    print(f"{found['images']} images; means over images with 95 % intervals")
    for entry in found["layers"]:
        print(f"{entry['layer']}: method, level, features: Spearman, slope of true effect on attribution")
        for row in entry["agreement"]:
            figures = [Summary(**row[k]) if row[k] else "    no figure" for k in ("spearman", "slope")]
            print(f"  {row['method']:20} {row['level']:8} {row['set']:12}  {figures[0]}  {figures[1]}")
        if pairs := entry["pairs"]:
            print(
                f"  pairs of top concepts: |effect - sum| / |sum| {pairs['median']:.3f} (median of {pairs['pairs']}); "
                f"{pairs['redundant']:.0%} do more together than one by one"
            )


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


def _show_catalogue(found: dict[str, Any]) -> None:
    from elude_runtime.offline.bench import Ratio

    facts = found["environment"]
    print(f"torch {facts['torch']}, {facts['threads']} threads on {facts['cores']} cores")
    features = ", ".join(f"{layer} {count}" for layer, count in found["features"].items())
    print(f"catalogue of {found['images']} images ({features} features) / plain pass: {Ratio(**found['ratio'])}")
    print(f"  {found['catalogue_seconds']} s / {found['plain_seconds']} s; by stage:")
    for stage, seconds in found["stages_seconds"].items():
        print(f"  {seconds:8.2f} s  {stage}")
    verdict = "met" if found["met"] else "NOT met"
    beyond, bound = found["seconds_beyond_two_passes"], found["bound_seconds"]
    print(f"beyond two plain passes: {beyond} s, at most {bound}: {verdict}")
