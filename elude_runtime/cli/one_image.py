"""One image through the serving engine, in this process: what `elude explain` and `elude steer` share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elude_runtime.cli.edit_text import EDIT_HELP, VECTOR_HELP, parse_edit, parse_vector
from elude_runtime.errors import EludeError, ImagesError, StorageError

if TYPE_CHECKING:
    from elude_runtime.analysis.edits import Steering
    from elude_runtime.api.engine import Engine
    from elude_runtime.api.schema.reply import Prediction, Reply
    from elude_runtime.api.schema.request import Change
    from elude_runtime.cli.drawing import Edited, Shown

ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP.")]
Checkpoint = Annotated[Path, typer.Option("--ckpt", metavar="CKPT", help="The checkpoint that `elude rewrite` made.")]
Edits = Annotated[list[str] | None, typer.Option("--edit", metavar="EDIT", help=EDIT_HELP)]
Vectors = Annotated[list[str] | None, typer.Option("--vector", metavar="NAME[=STRENGTH]", help=VECTOR_HELP)]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", metavar="NAME", help="A stored policy (`elude policy`); repeated.")
]
Multiplier = Annotated[float, typer.Option(help="Scales the change that each edit and vector makes.")]
Conflict = Annotated[str, typer.Option(help="Two edits of one sub-unit at one token: error, sum or last.")]
Drawn = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw it into this file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
TrustFactory = Annotated[bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the engine's reply as it is.")]

_NO_LIMIT = 10**9
"""The limits keep a server's other clients safe; here there are none."""


class Asked:
    """An image file and a loaded checkpoint, and one question to it after another."""

    def __init__(self, file: Path, checkpoint: Path, *, device: str = "auto", trust_factory: bool = False) -> None:
        """EludeError for a file that cannot be read or a checkpoint that cannot be loaded."""
        from elude_runtime.api.config import ServingConfig
        from elude_runtime.api.engine import Engine

        self.file, self.checkpoint = file, checkpoint
        try:
            self.encoded = file.read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ImagesError(f"The image {file} cannot be read ({reason}); give a JPEG, PNG or WebP file.") from error
        sizes = [k for k in ServingConfig.model_fields if k.startswith("max_") and k != "max_json_depth"]
        config = ServingConfig.model_validate(
            {"device": device, "trust_factory": trust_factory, **dict.fromkeys(sizes, _NO_LIMIT)}
        )
        self.engine: Engine = Engine.open(checkpoint, config, name=checkpoint.resolve().name, version="local")

    def ask(self, document: dict[str, Any]) -> tuple[Reply, str]:
        """The reply, and its text as the server would send it. EludeError where it is a problem."""
        from elude_runtime.api.intake import Row
        from elude_runtime.api.schema.reply import ProblemDocument, Reply

        parts = {"image": self.encoded, "request": json.dumps(document).encode()}
        (answered,) = self.engine.answer([Row(parts, "multipart/form-data", False, "", "cli")])
        if answered.status == 200:
            return Reply.model_validate_json(answered.body), answered.body
        raise EludeError(_sentence(ProblemDocument.model_validate_json(answered.body)))

    def draw(self, reply: Reply, steer: dict[str, Any] | None, out: Path) -> None:
        """The reply as a picture. StorageError where the file cannot be written."""
        from elude_runtime.cli.drawing import draw_reply
        from elude_runtime.cli.faces import Faces
        from elude_runtime.network.preprocessing import SERVED_FORMATS, decode_image

        image = decode_image(self.encoded, formats=SERVED_FORMATS)
        edited = self._edited(reply, steer) if steer else ()
        drawn = draw_reply(image, reply, self.file.name, edited, Faces(self.checkpoint).of)
        try:
            drawn.save(out)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise StorageError(f"The drawing cannot be written to {out} ({reason}); name a .png file.") from error

    def _edited(self, reply: Reply, steer: dict[str, Any]) -> list[Edited]:
        """What acts on the answer: the named policies' edits and vectors, then the request's own."""
        from elude_runtime.api.changes import steering_of
        from elude_runtime.api.schema.request import Steer

        own = Steer.model_validate(steer)
        rules = [self.engine.policies.rules[name] for name in dict.fromkeys(own.policies)]
        found = [e for r in rules for e in self._edited_by(reply, r.policy, r.steering, f"{r.name}: ")]
        return found + self._edited_by(reply, own, steering_of(own, self.engine.vectors), "")

    def _edited_by(self, reply: Reply, change: Change, steering: Steering, prefix: str) -> list[Edited]:
        from elude_runtime.analysis.scope import scope_mask
        from elude_runtime.cli.drawing import Edited
        from elude_runtime.network.tokens import POSITION

        model, (width, height) = self.engine.model, (reply.input.width, reply.input.height)
        x0, y0, x1, y1 = reply.input.window
        window = x0 / width, y0 / height, x1 / width, y1 / height
        features = [model.feature(edit.feature) for edit in steering.edits]
        acted_on = [(f.layer, f.token_type, e.apply) for f, e in zip(features, steering.edits, strict=True)]
        acted_on += [(vector.layer, POSITION, vector.apply) for vector in steering.vectors]
        shown: list[Shown | None] = [*self._shown([edit.feature for edit in change.edits])]
        shown += [None] * len(change.vectors)
        found = []
        for wish, (layer, token_type, scope), feature in zip(
            (*change.edits, *change.vectors), acted_on, shown, strict=True
        ):
            layout, cells = model.state(layer).layout, None
            if layout.grid is not None and token_type == POSITION and scope.tokens != "cls":
                mask = scope_mask(scope, layout, window)
                cells = mask[layout.slices[POSITION]].reshape(layout.grid).tolist()
            found.append(Edited(prefix + words(wish.model_dump(mode="json")), cells, feature))
        return found

    def _shown(self, names: list[str]) -> list[Shown]:
        """Features as the unchanged pass has them."""
        import numpy as np

        from elude_runtime.cli.drawing import Shown
        from elude_runtime.network.tokens import POSITION

        if not names:
            return []
        reply, _ = self.ask({"activations": {"features": names, "reduce": "tokens"}})
        made = []
        for found in reply.activations or []:
            feature, values = self.engine.model.feature(found.feature), np.array(found.values)
            grid = self.engine.model.state(feature.layer).layout.grid
            on_grid = values.reshape(grid) if grid is not None and feature.token_type == POSITION else None
            made.append(Shown(found.feature, found.label, float(values[np.abs(values).argmax()]), on_grid))
        return made


def steer_document(
    edits: Sequence[str] | None,
    vectors: Sequence[str] | None,
    policies: Sequence[str] | None,
    multiplier: float,
    conflict: str,
) -> dict[str, Any] | None:
    """`steer` of a request from the command line's words, None where there are none. EludeError for a wrong one."""
    if not edits and not vectors and not policies:
        return None
    return {
        "edits": [parse_edit(text) for text in edits or []],
        "vectors": [parse_vector(text) for text in vectors or []],
        "policies": list(policies or []),
        "strength_multiplier": multiplier,
        "conflict": conflict,
    }


def words(change: dict[str, Any]) -> str:
    """An edit's or vector's document as a short line."""
    if "feature" in change:
        made = f"{change['feature']} {change['mode']}"
        if "value" in change:
            made += f" {change['value']:g}" + (" std" if change.get("unit") == "std" else "")
        if change["side"] != "both":
            made += f", {change['side']} side"
    else:
        made = f"vector {change.get('name') or 'of ' + change['layer']} times {change['strength']:g}"
    scope = change["apply"]
    if "box" in scope:
        made += f", box {', '.join(f'{v:g}' for v in scope['box'])}"
    elif "mask" in scope:
        made += ", mask"
    elif scope["tokens"] != "all":
        made += f", {scope['tokens']}"
    if change["when"] is not None:
        made += f", when {change['when']['feature']} {change['when']['op']} {change['when']['value']:g}"
    return made


def _sentence(problem: Any) -> str:
    """A problem as one sentence, with the closest names where it does not give them already."""
    from elude_runtime.api.schema.reply import ProblemDocument

    assert isinstance(problem, ProblemDocument)
    near = [name for error in problem.errors or [] for name in error.suggestions or []][:3]
    if not near or any(re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", problem.detail) for name in near):
        return problem.detail
    return f"{problem.detail} Did you mean {' or '.join(near)}?"


# --- what is printed --------------------------------------------------------------------------------------------------


def print_head(out: Console, file: Path, reply: Reply) -> None:
    """The image, what the model saw of it, the unchanged model's classes, and the warnings."""
    x0, y0, x1, y1 = reply.input.crop
    out.print(f"[bold]{plain(file)}[/]  {reply.input.width} x {reply.input.height}, seen x {x0}-{x1}, y {y0}-{y1}")
    for prediction in reply.predictions:
        out.print(f"  {prediction.probability:6.1%}  {plain(class_name(prediction.index, prediction.label))}")
    if not reply.predictions:
        out.print(f"  an embedding of {len(reply.embedding or [])} numbers")
    for warning in reply.warnings:
        out.print(f"  [yellow]{warning.code}[/]: {plain(warning.detail)}")


def print_steered(out: Console, reply: Reply) -> None:
    """Default and steered answers side by side."""
    steered = reply.steered
    if steered is None:
        out.print("\nNo edit is in force.")
        return
    norms = ", ".join(f"{layer} {norm:.3g}" for layer, norm in steered.relative_norm.items())
    out.print(f"\n[bold]steered[/]  {plain(top_class(reply.predictions))} -> {plain(top_class(steered.predictions))}")
    out.print(f"  edits that acted: {steered.edits_applied}; relative norm of the change: {plain(norms or 'none')}")
    if not steered.changes:
        return
    made = table("class", "default", "steered", "change", left=("class",))
    for c in steered.changes:
        made.add_row(plain(class_name(c.index, c.label)), f"{c.default:.4f}", f"{c.steered:.4f}", f"{c.change:+.4f}")
    out.print(made)


def table(*headings: str, left: Sequence[str] = ()) -> Table:
    made = Table(box=None, header_style="bold")
    for heading in headings:
        made.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return made


def class_name(index: int | None, label: str | None) -> str:
    if index is None:
        return "the embedding"
    return f"{label} ({index})" if label else f"class {index}"


def top_class(predictions: Sequence[Prediction]) -> str:
    first = next(iter(predictions), None)
    return "-" if first is None else f"{class_name(first.index, first.label)} {first.probability:.1%}"


def plain(text: object) -> str:
    """Text that rich does not read as markup, whatever names and labels hold."""
    return escape(str(text))
