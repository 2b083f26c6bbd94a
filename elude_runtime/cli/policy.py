"""`elude policy`: the interventions that are stored with a checkpoint, for requests and operators to put in force."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elude_runtime.cli.edit_text import EDIT_HELP, VECTOR_HELP, parse_edit, parse_vector
from elude_runtime.cli.progress import console as errors
from elude_runtime.cli.progress import printer

policy = typer.Typer(
    help="Stored policies: named edits that a request or the server's configuration puts in force.",
    no_args_is_help=True,
)
_DEPTH = 32  # nesting of a document in a file
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@policy.command("list")
def list_policies(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Name the policies of a checkpoint."""
    found: list[dict[str, Any]] = [
        {"name": name, "sha256": _sha256(checkpoint, name, document), "policy": document}
        for name, document in _stored(checkpoint).items()
    ]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = printer()
    if not found:
        console.print("No policy is stored; `elude policy set` makes one.")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("policy", "sha256", "edits", "vectors", "description"):
        table.add_column(heading, justify="right" if heading in ("edits", "vectors") else "left")
    for one in found:
        document = one["policy"]
        parts = [str(len(document.get(key) or ())) for key in ("edits", "vectors")]
        table.add_row(one["name"], one["sha256"][:12], *parts, escape(document.get("description") or "-"))
    console.print(table)


@policy.command("show")
def show(checkpoint: Checkpoint, name: Name, as_json: AsJson = False) -> None:
    """Print one policy as the document it is; `set --file` takes it back."""
    from elude_runtime.checkpoint.policies import unknown_policy

    stored = _stored(checkpoint)
    if name not in stored:
        raise unknown_policy(name, stored)
    document = stored[name]
    if as_json:
        document = {"name": name, "sha256": _sha256(checkpoint, name, document), "policy": document}
    print(json.dumps(document, indent=2, ensure_ascii=False))


@policy.command("set")
def set_policy(
    checkpoint: Checkpoint,
    name: Name,
    file: Annotated[Path | None, typer.Option(help="A JSON file with what a request's `steer` holds.")] = None,
    edit: Annotated[list[str] | None, typer.Option(help=EDIT_HELP)] = None,
    vector: Annotated[list[str] | None, typer.Option(help=VECTOR_HELP)] = None,
    description: Annotated[str | None, typer.Option(help="What it is for, in a sentence.")] = None,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Store a policy, tried on the checkpoint first; one of the same name is replaced."""
    from elude_runtime.analysis.model import load
    from elude_runtime.api.config import ServingConfig
    from elude_runtime.api.policies import PolicyBook
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.checkpoint.policies import read_policies, save_policy
    from elude_runtime.checkpoint.vectors import check_partition, checked_name, read_vectors
    from elude_runtime.errors import CheckpointError, EludeError

    checked_name(name, "policy")
    digest = read_manifest(checkpoint).partition_sha256
    document = _document(file)
    for key, parse, texts in (("edits", parse_edit, edit), ("vectors", parse_vector, vector)):
        if not isinstance(document.get(key, []), list):
            raise EludeError(f"The {key} in {file} are not a list.")
        if texts:
            document[key] = [*document.get(key, []), *map(parse, texts)]
    if not document.get("edits") and not document.get("vectors"):
        raise EludeError("The policy would change nothing; give it --edit, --vector or --file.")
    if description is not None:
        document["description"] = description
    check_partition(str(document.setdefault("partition_sha256", digest)), digest, f"The policy in {file}")
    _check_text(document)
    vectors = read_vectors(checkpoint, digest)
    _check_vectors(document, vectors)
    model = load(checkpoint, trust_factory=trust_factory)
    rule = PolicyBook(model, ServingConfig(), {name: document}, vectors).rules[name]
    replaced = save_policy(checkpoint, name, rule.policy.model_dump(mode="json", exclude_unset=True))
    try:
        read_policies(checkpoint, digest)
    except CheckpointError as error:  # another policy keeps the checkpoint from being served
        errors.print(f"[yellow]note:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"name": name, "sha256": rule.sha256, "replaced": replaced}))
        return
    done = "replaced" if replaced else "stored"
    print(f'Policy {name} {done}, sha256 {rule.sha256[:12]}. Ask for it with {{"policies": ["{name}"]}}.')


@policy.command("remove")
def remove(checkpoint: Checkpoint, name: Name) -> None:
    """Take a policy out of the checkpoint."""
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.checkpoint.policies import remove_policy

    read_manifest(checkpoint)
    remove_policy(checkpoint, name)
    print(f"Policy {name} removed.")


def _stored(checkpoint: Path) -> dict[str, dict[str, Any]]:
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.checkpoint.policies import read_policies

    return read_policies(checkpoint, read_manifest(checkpoint).partition_sha256)


def _sha256(checkpoint: Path, name: str, document: dict[str, Any]) -> str:
    """The digest that a server names in its audit lines. ConfigError for a policy that it would refuse."""
    from elude_runtime.api.policies import digest, validated_policy
    from elude_runtime.checkpoint.vectors import read_vectors

    return digest(validated_policy(name, document), read_vectors(checkpoint, document["partition_sha256"]))


def _check_text(document: dict[str, Any]) -> None:
    """EludeError for text that no file can hold, such as bytes of a command line that are no UTF-8."""
    from elude_runtime.errors import EludeError

    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise EludeError(f"The policy holds text that is not Unicode ({error.object[error.start]!r}).") from error


def _check_vectors(document: dict[str, Any], known: Collection[str]) -> None:
    """EludeError, with the closest names, for a stored vector that the policy names and that is not there."""
    from elude_runtime.errors import EludeError, did_you_mean

    names = [v["name"] for v in document.get("vectors", []) if isinstance(v, dict) and isinstance(v.get("name"), str)]
    for name in names:
        if name not in known:
            stored = f" There are {', '.join(known)}." if known else " None is stored; `elude vector --save` makes one."
            raise EludeError(f"The checkpoint has no vector {name[:80]!r}.{did_you_mean(name, known) or stored}")


def _document(file: Path | None) -> dict[str, Any]:
    """What the file says, or an empty document."""
    from elude_runtime.api.schema.json_text import JSONError, parse_json
    from elude_runtime.errors import EludeError

    if file is None:
        return {}
    try:
        found = parse_json(file.read_bytes(), _DEPTH)
    except OSError as error:
        raise EludeError(f"{file} cannot be read ({error.strerror}); give a JSON file with --file.") from error
    except JSONError as error:
        raise EludeError(f"{file} cannot be used: {error}") from error
    if not isinstance(found, dict):
        raise EludeError(f'{file} does not hold a JSON object, such as {{"edits": […]}}.')
    return found
