"""`elude health`: a probe that tells the truth; needs little but the standard library, so that it starts quickly."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from elude_runtime.errors import EludeError, ServerError

# Loopback addresses must not go through a proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# A file of this name in the run folder: the server is about to be stopped, and must get no more requests.
DRAINING = "draining"


def fetch_json(url: str, token: str | None = None, timeout: float = 5.0) -> Any:
    """The JSON at `url`; raises `ServerError` with one sentence if there is no answer, or another than 200."""
    if not url.startswith(("http://", "https://")):
        raise EludeError(f"{url} is no address; it must begin with http:// or https://.")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        if error.code == 400 and "oken" in text:
            raise ServerError(f"{url} wants a token: give --token, or --run-dir of the server.") from error
        raise ServerError(f"{url} answered {error.code}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"{url} does not answer: {reason}") from error


def ready_workers(management: str, model: str, token: str | None = None, timeout: float = 5.0) -> tuple[int, int]:
    """How many workers of a model are READY, and how many there should be; over all of its versions the worst one."""
    url = f"{management.rstrip('/')}/models/{urllib.parse.quote(model, safe='')}/all"
    versions = fetch_json(url, token, timeout)
    if not isinstance(versions, list) or not versions:
        raise ServerError(f"{url} lists no version of the model.")
    counts = []
    for version in versions:
        workers = version.get("workers") or []
        counts.append((sum(worker.get("status") == "READY" for worker in workers), version.get("minWorkers", 1)))
    return min(counts)


def not_ready(management: str, models: list[str], token: str | None = None, timeout: float = 5.0) -> str | None:
    """Why the server is not ready, in one sentence; None if every model has a READY worker.

    `/ping` answers 200 before a model is loaded, and while its worker dies and is started again; a worker's own
    state on the management port does not. With no `models`, all that the server knows.
    """
    try:
        names = models or model_names(management, token, timeout)
        if not names:
            return "The server has no models."
        for name in names:
            ready, _ = ready_workers(management, name, token, timeout)
            if ready == 0:
                return f"No worker of model {name} is ready."
    except ServerError as error:
        return str(error)
    return None


def model_names(management: str, token: str | None = None, timeout: float = 5.0) -> list[str]:
    """The names of all models that the server has registered, over all pages of its list."""
    names: list[str] = []
    page = ""
    while True:
        query = urllib.parse.urlencode({"limit": 100, **({"next_page_token": page} if page else {})})
        listing = fetch_json(f"{management.rstrip('/')}/models?{query}", token, timeout)
        names += [item["modelName"] for item in listing.get("models", [])]
        page = str(listing.get("nextPageToken") or "")
        if not page:
            return sorted(set(names))


def health(
    ready: Annotated[bool, typer.Option("--ready", help="A worker of every model must be READY.")] = False,
    management: Annotated[str, typer.Option(help="Management address, for --ready.")] = "http://127.0.0.1:8081",
    inference: Annotated[str, typer.Option(help="Inference address, without --ready.")] = "http://127.0.0.1:8080",
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")] = None,
    token: Annotated[str | None, typer.Option(help="Management key (inference key without --ready).")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Addresses and keys from this folder of `elude serve`.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each question.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Exit 0 if the server is alive or, with --ready, if it can answer; 1 with the reason otherwise."""
    starting = run_dir is not None and not (run_dir / "run.json").exists()
    if run_dir is not None and not starting:
        management, inference = read_addresses(run_dir)
        token = token or read_keys(run_dir).get("management" if ready else "inference")
    reason: str | None
    if starting:  # what a probe meets in the first second; 2 would tell Docker something else
        reason = f"No server runs in {run_dir}, or it has only just been started."
    elif ready and run_dir is not None and (run_dir / DRAINING).exists():
        reason = "The server is being stopped."
    else:
        reason = not_ready(management, model or [], token, timeout) if ready else _not_alive(inference, token, timeout)
    if as_json:
        print(json.dumps({"ok": reason is None, "checked": "ready" if ready else "alive", "reason": reason}))
    else:
        print(reason or ("ready" if ready else "alive"))
    if reason is not None:
        raise typer.Exit(1)


def read_keys(run_dir: Path) -> dict[str, str]:
    """The keys of a server with token authorization, by purpose (`inference`, `management`, `API`); empty without."""
    file = run_dir / "key_file.json"
    return read_key_file(file) if file.exists() else {}


def read_key_file(file: Path) -> dict[str, str]:
    """The keys in TorchServe's key_file.json, by purpose. ServerError where it cannot be read."""
    try:
        content = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not TorchServe's"
        raise ServerError(f"{file} cannot be read as a key file: {reason}.") from error
    return {purpose: entry["key"] for purpose, entry in content.items() if isinstance(entry, dict) and "key" in entry}


def _not_alive(inference: str, token: str | None, timeout: float) -> str | None:
    try:
        fetch_json(f"{inference.rstrip('/')}/ping", token, timeout)
    except ServerError as error:
        return str(error)
    return None


def read_addresses(run_dir: Path) -> tuple[str, str]:
    """Management and inference address, from what `elude serve` wrote into its run folder."""
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        return str(record["management_url"]), str(record["url"])
    except (OSError, ValueError, KeyError) as error:
        raise EludeError(f"{run_dir} is no run folder of `elude serve`: run.json cannot be read.") from error
