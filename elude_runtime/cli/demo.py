"""`elude demo`: the whole main job on the embedded default, told on one screen."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from elude_runtime.demo.run import Story


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("elude-demo"),
) -> None:
    """Rewrite, verify, catalogue, serve, explain and steer a small model, from nothing but this package."""
    from elude_runtime.cli.server_process import require_programs
    from elude_runtime.demo.report import write_report
    from elude_runtime.demo.run import run

    require_programs()
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "[bold]ELUDe serving[/] makes a vision model's inner features visible and steerable in production, and "
        "changes no prediction.\nA small transformer learned toys; nearly every 'cracked toy' that it saw wore a small "
        "watermark. Did it learn the crack?\n"
    )
    with console.status("") as status:

        def say(line: str) -> None:
            console.print(f" [green]·[/] {line}", soft_wrap=True)
            status.update("working …")

        story = run(out, say)
    report = write_report(story)
    _tell(console, story, report)
    if story.failures:
        raise typer.Exit(1)


def _tell(console: Console, story: Story, report: Path) -> None:
    console.print("\n[bold]It had learned the watermark.[/] Accuracy by default, and with it ablated by request:")
    for text, before, after in story.summary:
        console.print(f"   {text:<36} {_bar(before, 'yellow')} {before:>4.0%}   {_bar(after, 'green')} {after:>4.0%}")
    same = "did not change" if story.unchanged_defaults else "[bold red]CHANGED[/]"
    console.print(f"   The default predictions in the same replies {same}.")
    for failure in story.failures:
        console.print(f"[bold red]Did not hold:[/] {failure}")
    console.print(f"\nThis story in pictures: open {report}    ({story.seconds:.0f} s)", soft_wrap=True)
    elude = Path(sys.argv[0]).name if shutil.which(Path(sys.argv[0]).name) else sys.argv[0]
    store, checkpoint = story.out / "model_store", story.out / "checkpoint"
    for what, command in (
        ("Every feature in pictures", f"open {story.pages}"),
        ("Your own model", f"{elude} layers MODEL, {elude} rewrite MODEL --pretrained --images DIR --out CKPT"),
        ("Serve it yourself", f"{elude} serve --model-store {store} --foreground"),
        ("Turn features up and down, in the browser", f"{elude} explore {checkpoint}"),
    ):
        console.print(f"{what}: {command}", soft_wrap=True)


def _bar(share: float, colour: str, width: int = 12) -> str:
    filled = round(width * share)
    return f"[{colour}]{'█' * filled}[/][dim]{'░' * (width - filled)}[/]"
