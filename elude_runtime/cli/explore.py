"""`elude explore`: the report's pages and a live server behind one local address, to look at and steer one's images."""

from __future__ import annotations

import json
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elude_runtime.cli.health import read_key_file
from elude_runtime.cli.progress import console
from elude_runtime.errors import CheckpointError, EludeError, ServerError

if TYPE_CHECKING:
    import uvicorn

    from elude_runtime.cli.torchserve import Server
    from elude_runtime.explore.material import Material


def explore(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder made by `elude rewrite`.")],
    url: Annotated[
        str | None, typer.Option(help="Inference address of a server that runs; default: one is started and stopped.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="ELUDE_TOKEN", help="Inference key of that server.", show_default=False)
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="key_file.json of that server, in place of --token.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name in the URL; default: as of `elude archive`.")] = None,
    port: Annotated[
        int | None, typer.Option(help="The explorer's own port; default: a free one.", min=1, max=65535)
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until the started server must be ready.")] = 300.0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON.")] = False,
) -> None:
    """Look at features and steer them on your own images, in the browser, against a live server."""
    from elude_runtime.cli.archive import default_name
    from elude_runtime.explore.app import Explorer, new_secret
    from elude_runtime.explore.listen import HOST, loopback_socket, web_server
    from elude_runtime.explore.material import Material
    from elude_runtime.explore.pages import write_pages
    from elude_runtime.explore.served import ServedModel

    if url is None and key_file is not None:
        raise EludeError("--key-file belongs to a server that runs; give its address with --url.")
    material = Material(checkpoint)
    name = model or default_name(checkpoint)
    digest = material.manifest.checkpoint_sha256
    served = ServedModel(url, name, digest, token=token or _key(key_file)) if url is not None else None
    with (
        tempfile.TemporaryDirectory(prefix="elude-explore-") as scratch,
        loopback_socket(port) as listening,
        nullcontext() if served else own_server(material, Path(scratch), name, trust_factory=trust_factory) as own,
    ):
        with console.status("Rendering the pages"):
            write_pages(checkpoint, Path(scratch) / "pages")
        if own is not None:
            with console.status(f"Starting TorchServe and loading {name}"):
                own.wait_ready(timeout)
            served = ServedModel(own.url, name, digest, token=own.token())
        assert served is not None
        number = listening.getsockname()[1]
        explorer = Explorer(served, material, Path(scratch) / "pages", new_secret(), f"elude-explore-{number}")
        facts = {"address": f"http://{HOST}:{number}/?key={explorer.secret}", "url": served.url, "model": name}
        facts |= {"key_file": str(own.run_dir / "key_file.json")} if own else {}
        print(json.dumps(facts, indent=2) if as_json else _screen(facts), flush=True)
        if open_browser:
            listening.listen()  # so that the browser waits for the server instead of being refused
            webbrowser.open(_doorway(Path(scratch), facts["address"]).as_uri())
        web = web_server(explorer.app())
        try:
            with _ending_with(own, web):
                web.run(sockets=[listening])
        except KeyboardInterrupt:
            console.print("Stopping")


@contextmanager
def own_server(material: Material, scratch: Path, name: str, *, trust_factory: bool = False) -> Iterator[Server]:
    """A TorchServe of our own on an archive of the checkpoint, started and not yet ready."""
    from elude_runtime.cli.archive import build_archive
    from elude_runtime.cli.torchserve import Server

    if material.manifest.model.kind == "factory" and not trust_factory:
        raise CheckpointError(
            f"{material.checkpoint} carries code of its own (factory/); look at it and give --trust-factory."
        )
    with console.status(f"Packing {name}"):
        archive = build_archive(material.checkpoint, scratch / "model_store", name=name)
    environment = {"ELUDE_TRUST_FACTORY": "true"} if trust_factory else {}
    with Server(scratch / "model_store", [archive.name], environment=environment) as server:
        yield server


@contextmanager
def _ending_with(own: Server | None, web: uvicorn.Server) -> Iterator[None]:
    """Ends the web server when our TorchServe ends by itself; ServerError then."""
    if own is None:
        yield
        return
    ended: list[int] = []

    def watch() -> None:
        ended.append(own.wait())
        web.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    yield
    if ended:
        raise ServerError(f"TorchServe ended by itself with status {ended[0]}; logs in {own.run_dir / 'logs'}")


def _doorway(scratch: Path, address: str) -> Path:
    """A page, readable by its owner alone, that leads to the address: a browser's command line is there for every user
    of the host to see, and the address carries the key."""
    page = scratch / "open.html"
    page.touch(mode=0o600)
    page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0;url={address}">', encoding="utf-8")
    return page


def _key(file: Path | None) -> str | None:
    """The inference key in a server's key file."""
    if file is None:
        return None
    key = read_key_file(file).get("inference")
    if key is None:
        raise EludeError(f"{file} has no inference key; give the key_file.json of the server's run folder.")
    return key


def _screen(facts: dict[str, str]) -> str:
    lines = [f"Open: {facts['address']}", "", f"  server   {facts['url']}/predictions/{facts['model']}"]
    if "key_file" in facts:
        read = f"""python3 -c 'import json; print(json.load(open("{facts["key_file"]}"))["inference"]["key"])'"""
        lines.append(f"  its key  TOKEN=$({read})")
    return "\n".join([*lines, "", "The address is for you alone: it carries a key. Stop: Ctrl-C"])
