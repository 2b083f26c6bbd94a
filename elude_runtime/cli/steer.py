"""`elude steer`: what the model answers on one image with features changed, beside what it answers without."""

from __future__ import annotations

from typing import Annotated

import typer

from elude_runtime.cli import one_image as one
from elude_runtime.cli.progress import printer
from elude_runtime.errors import EludeError


def steer(
    image: one.ImageFile,
    checkpoint: one.Checkpoint = ...,  # type: ignore[assignment]
    edit: one.Edits = None,
    vector: one.Vectors = None,
    policy: one.Policies = None,
    multiplier: one.Multiplier = 1.0,
    conflict: one.Conflict = "error",
    top_k: Annotated[int, typer.Option(help="Classes shown.")] = 5,
    png: one.Drawn = None,
    device: one.Device = "auto",
    trust_factory: one.TrustFactory = False,
    as_json: one.AsJson = False,
) -> None:
    """Change features and compare the answers; nothing is stored."""
    wish = one.steer_document(edit, vector, policy, multiplier, conflict)
    if wish is None:
        raise EludeError("Say what to change: --edit FEATURE:MODE[=VALUE], --vector NAME or --policy NAME.")
    asked = one.Asked(image, checkpoint, device=device, trust_factory=trust_factory)
    reply, text = asked.ask({"steer": wish, "top_k": top_k})
    if png is not None:
        asked.draw(reply, wish, png)
    if as_json:
        print(text)
        return
    out = printer()
    one.print_head(out, image, reply)
    one.print_steered(out, reply)
    if png is not None:
        out.print(f"\nDrawn to {png}.")
