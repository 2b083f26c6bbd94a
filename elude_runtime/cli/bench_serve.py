"""`elude bench serve`: the speed of serving, beside a minimal TorchServe handler for the same model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console, stages
from elude_runtime.errors import EludeError
from elude_runtime.package_files import shipped_file

if TYPE_CHECKING:
    from elude_runtime.cli.torchserve import Server
    from elude_runtime.traffic.process import Cores

OURS, MINIMAL = "elude", "minimal"
_POLL_SECONDS = 0.05


def serve(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that `elude rewrite` made.")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    clients: Annotated[
        list[int] | None, typer.Option(help="Clients at a time, repeated; default: 1, 4 and 16.", min=1)
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of runs, ELUDe and minimal, each number of clients.", min=1)] = 20,
    seconds: Annotated[float, typer.Option(help="About how long one run lasts.", min=0.01)] = 1.5,
    mixed_seconds: Annotated[
        float, typer.Option(help="How long one run with explained rows lasts; 0 for none.", min=0)
    ] = 3.0,
    load: Annotated[float, typer.Option(help="Its requests, as a share of the throughput.", min=0.01, max=1)] = 0.5,
    share: Annotated[float, typer.Option(help="Of its rows, those that are explained.", min=0.01, max=0.9)] = 0.1,
    starts: Annotated[int, typer.Option(help="Pairs of starts; 0 for none.", min=0)] = 4,
    max_images: Annotated[int, typer.Option(help="Use this many, spread over the folder.", min=1)] = 32,
    config: Annotated[Path | None, typer.Option(help="model-config.yaml of both; default: the shipped one.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="torch threads of a worker; default: torch's own choice.", min=1)
    ] = None,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Throughput, latency and start of ELUDe's handler over a minimal handler's, each behind a TorchServe of its own
    on this host; and what explained rows cost the plain rows beside them."""
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.cli.archive import build_archive
    from elude_runtime.cli.minimal_archive import build_minimal_archive
    from elude_runtime.network.preprocessing import DataConfig
    from elude_runtime.offline.images import ImageSource
    from elude_runtime.traffic.compare import Plan, Target, compare_mixed, compare_plain, compare_starts, open_rate
    from elude_runtime.traffic.process import LoadProcess, pinned, split_cores

    manifest = read_manifest(checkpoint)
    encoded = list(ImageSource(images, DataConfig.parse(manifest.data_config)).encoded(max_images))
    if not encoded:
        raise EludeError(f"None of the images in {images} can be read; give JPEG, PNG or WebP files.")
    settings = _settings(config)
    plan = Plan(tuple(clients or (1, 4, 16)), pairs, seconds, mixed_seconds, load, share, settings["batchSize"])
    server_cores, generator_cores = split_cores()
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    ours = {**environment, "ELUDE_TRUST_FACTORY": "true"} if trust_factory else environment
    with TemporaryDirectory(prefix="elude-bench-") as folder:
        store = Path(folder)
        with console.status("Packing both"):
            build_minimal_archive(checkpoint, store, name=MINIMAL, config=config, trust_factory=trust_factory)
            build_archive(checkpoint, store, name=OURS, config=config)
        found: dict[str, Any] = {
            "environment": _environment(server_cores, generator_cores, threads),
            "checkpoint_sha256": manifest.checkpoint_sha256,
            "images": len(encoded),
            "settings": settings,
        }
        start_ours = partial(_started, store, OURS, ours, server_cores)
        start_minimal = partial(_started, store, MINIMAL, environment, server_cores)
        # this process draws its progress bars beside the generator
        with pinned(generator_cores), stages() as bar:
            if starts:
                both = partial(_seconds_to_ready, start_ours), partial(_seconds_to_ready, start_minimal)
                found["start"] = compare_starts(*both, starts, bar)
            with start_ours() as a, start_minimal() as b, LoadProcess(generator_cores) as process:
                for server in (a, b):
                    server.wait_ready()
                targets = [Target(f"{server.url}/predictions/{server.names[0]}", encoded) for server in (a, b)]
                found["plain"] = compare_plain(process, targets[0], targets[1], plan, bar)
                if mixed_seconds:
                    rate = open_rate(found["plain"], plan)
                    found["mixed"] = compare_mixed(process, targets[0], rate, plan, bar)
    print(json.dumps(found, indent=2)) if as_json else _show(found)


@contextmanager
def _started(store: Path, name: str, environment: dict[str, str], cores: Cores) -> Iterator[Server]:
    """A server with one archive of the store, on these cores; its worker is not READY yet."""
    from elude_runtime.cli.torchserve import Server
    from elude_runtime.traffic.process import pinned

    server = Server(store, [f"{name}.mar"], token_auth=False, environment=environment)
    try:
        with pinned(cores):
            server.start()
        yield server
    finally:
        server.stop()


def _seconds_to_ready(started: Callable[[], AbstractContextManager[Server]]) -> float:
    with started() as server:
        since = time.perf_counter()
        server.wait_ready(poll=_POLL_SECONDS)
        return time.perf_counter() - since


def _settings(config: Path | None) -> dict[str, int]:
    """How both servers batch, of a model-config.yaml."""
    import yaml

    file = config or shipped_file("deploy/model-config.yaml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return {key: int(content.get(key, 1)) for key in ("batchSize", "maxBatchDelay", "minWorkers", "maxWorkers")}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise EludeError(
            f"{file} cannot be read as a model's settings ({' '.join(str(error).split())}); it must hold keys and "
            "values, such as `batchSize: 8`."
        ) from error


def _environment(servers: Cores, generator: Cores, threads: int | None) -> dict[str, Any]:
    import torch

    return {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": threads or "torch's own choice",
        "server_cores": sorted(servers) or "not pinned",
        "generator_cores": sorted(generator) or "not pinned",
    }


def _show(found: dict[str, Any]) -> None:
    facts, settings = found["environment"], found["settings"]
    print(
        f"torch {facts['torch']}, {facts['cores']} cores (servers on {facts['server_cores']}, generator on "
        f"{facts['generator_cores']}), threads of a worker: {facts['threads']}; "
        + ", ".join(f"{key} {value}" for key, value in settings.items())
    )
    for entry in found["plain"]:
        rate, half = entry["per_second"], entry["p50_ms"]
        print(f"plain predictions, {entry['clients']} client(s), runs of {entry['requests']} requests")
        print(
            f"  {'throughput':11} {_ratio(entry['throughput'])}  {rate['elude']:.1f} / {rate['minimal']:.1f} a second"
        )
        print(f"  {'p50':11} {_ratio(entry['p50'])}  {half['elude']:.1f} / {half['minimal']:.1f} ms")
    if mixed := found.get("mixed"):
        print(
            f"{mixed['share_explained']:.0%} of rows explained by gradients, {mixed['per_second']:.1f} requests a "
            f"second ({mixed['load']:.0%} of the throughput), {mixed['plain_rows']} plain rows"
        )
        high, half = mixed["p99_ms"], mixed["p50_ms"]
        print(f"  {'p99 of plain':11} {_ratio(mixed['p99'])}  {high['with']:.1f} / {high['without']:.1f} ms")
        print(
            f"  p50 of plain rows {half['with']:.1f} / {half['without']:.1f} ms, of explained ones "
            f"{mixed['explained_p50_ms']:.1f} ms; the generator was late by {mixed['generator_late_ms']:.1f} ms at most"
        )
    if start := found.get("start"):
        seconds = start["seconds"]
        print("a worker READY after the start of its server")
        print(f"  {'seconds':11} {_ratio(start['ready'])}  {seconds['elude']:.2f} / {seconds['minimal']:.2f} s")


def _ratio(entry: dict[str, Any]) -> str:
    """The ratio, its interval, the bar, and whether that holds."""
    from elude_runtime.offline.bench import Ratio

    ratio = Ratio(entry["median"], entry["low"], entry["high"], entry["pairs"])
    bar = f"at least {entry['at_least']}" if "at_least" in entry else f"at most {entry['at_most']}"
    return f"{ratio}, {bar}: {'met' if entry['met'] else 'NOT met'}"
