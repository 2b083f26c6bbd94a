"""`elude serve`: TorchServe over a model store, with the shipped configuration, isolated from other instances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from elude_runtime.errors import EludeError, ServerError

if TYPE_CHECKING:
    from elude_runtime.cli.torchserve import Server

_WAITING = "Waiting for requests in flight"


def serve(
    model_store: Annotated[Path, typer.Option(help="Folder of model archives.")] = Path("model_store"),
    models: Annotated[list[str] | None, typer.Option(help="FILE.mar or NAME=FILE.mar; repeated; default: all.")] = None,
    inference_port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
    management_port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
    exporter_port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
    config: Annotated[Path | None, typer.Option(help="Your own config.properties.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder for logs and keys; default: a temporary one.")] = None,
    token_auth: Annotated[bool, typer.Option(help="Ask for TorchServe's keys.")] = True,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.mar=SHA256", help="Serve this archive only as `elude archive` made it; repeated."),
    ] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C, then stop everything.")] = False,
    log_stdout: Annotated[bool, typer.Option("--log-stdout", help="The log as JSON lines here, too.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until every model must be ready.")] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds for requests in flight when it is stopped.", min=0)] = 20.0,
    stop: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Stop the server of this run folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Serve archives with TorchServe, on this host only."""
    from elude_runtime.cli.archive_digest import parse_expected
    from elude_runtime.cli.drain import drain
    from elude_runtime.cli.torchserve import Server, stop_server

    if stop is not None:
        with Console(stderr=True).status(_WAITING):
            drain(stop, grace)
        found = stop_server(stop) > 0
        print(json.dumps({"stopped": found}) if as_json else "Stopped." if found else "It had stopped already.")
        return
    server = Server(
        model_store,
        models,
        inference_port=inference_port,
        management_port=management_port,
        metrics_port=metrics_port,
        exporter_port=exporter_port,
        config=config,
        token_auth=token_auth,
        run_dir=run_dir,
        log_stdout=log_stdout,
        expect=parse_expected(expect or []),
    )
    try:
        with Console(stderr=True).status("Starting TorchServe and loading " + ", ".join(server.names)):
            server.start()
            server.wait_ready(timeout)
        if not foreground:
            _show(server, foreground, as_json)
    except BaseException as error:
        server.stop(keep_run_dir=isinstance(error, EludeError))
        raise
    if foreground:
        _stay(server, as_json, grace)


def _show(server: Server, foreground: bool, as_json: bool) -> None:
    print(json.dumps(_facts(server), indent=2) if as_json else _screen(server, foreground), flush=True)


def _stay(server: Server, as_json: bool, grace: float) -> None:
    """Shows the screen, waits for Ctrl-C or the server's end, and leaves nothing running."""
    from elude_runtime.cli.drain import drain
    from elude_runtime.cli.health import DRAINING

    try:
        _show(server, True, as_json)  # whoever reads it may press Ctrl-C at once
        status = server.wait()
    except KeyboardInterrupt:
        try:
            with Console(stderr=True).status(_WAITING):
                drain(server.run_dir, grace)
        finally:  # a second Ctrl-C waits no longer
            with Console(stderr=True).status("Stopping"):
                server.stop()
        return
    told = (server.run_dir / DRAINING).exists() or not (server.run_dir / "run.json").exists()  # by `elude serve --stop`
    server.stop(keep_run_dir=not told)
    if told:
        return
    raise ServerError(f"TorchServe ended by itself with status {status}; logs in {server.run_dir / 'logs'}")


def _facts(server: Server) -> dict[str, object]:
    return {
        "url": server.url,
        "management_url": server.management_url,
        "metrics_url": server.metrics_url,
        "exporter_url": server.exporter_url,
        "models": server.names,
        "run_dir": str(server.run_dir),
        "pid": server.pid,
        "key_file": str(server.run_dir / "key_file.json") if server.token() else None,
    }


def _screen(server: Server, foreground: bool) -> str:
    """Everything that one needs to use the server, on one screen."""
    keys = server.run_dir / "key_file.json"
    read = f"""python3 -c 'import json; print(json.load(open("{keys}"))["inference"]["key"])'"""
    header = f'-H "Authorization: Bearer $({read})" ' if server.token() else ""
    lines = [
        f"Ready: {', '.join(server.names)}",
        "",
        f"  predictions   {server.url}/predictions/{server.names[0]}",
        f"  explanations  {server.url}/explanations/{server.names[0]}",
        f"  management    {server.management_url}/models/{server.names[0]}",
        f"  metrics       {server.metrics_url}/metrics",
        *([f"                {server.exporter_url}/metrics"] if server.exporter_url else []),
        f"  keys          {keys}" if server.token() else "  keys          none asked for",
        f"  logs          {server.run_dir / 'logs'}",
        f"  process       {server.pid}",
        "",
        f"Try:    curl {header}-T IMAGE.jpg {server.url}/predictions/{server.names[0]}",
        f"Probe:  elude health --ready --run-dir {server.run_dir}",
        "Stop:   Ctrl-C" if foreground else f"Stop:   elude serve --stop {server.run_dir}",
    ]
    return "\n".join(lines)
