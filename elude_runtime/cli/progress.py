"""A progress bar a stage, on standard error, so that results on standard output stay clean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True)
_WIDTH = 10_000


def printer() -> Console:
    """Standard output for tables that are as wide as what they hold: in a narrow terminal no name and no figure is
    cut."""
    return Console(highlight=False, soft_wrap=True, width=_WIDTH)


def print_skipped(skipped: Sequence[tuple[str, str]], count: int | None = None) -> None:
    """Name the first images that could not be read, with the reasons, and count the others. count: how many there are,
    where `skipped` holds the first of them only."""
    count = len(skipped) if count is None else count
    for file, reason in skipped[:5]:
        console.print(f"[yellow]skipped[/] {escape(f'{file}: {reason}')}", highlight=False, soft_wrap=True)
    if count > 5:
        named = "every one" if count == len(skipped) else f"the first {len(skipped)}"
        console.print(f"[yellow]skipped[/] {count} images in all; --json names {named}.")


class Stages:
    """Called with (stage, newly done, total if known); a stage appears when it is first named."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[stage], advance=done)


@contextmanager
def stages(visible: bool = True) -> Iterator[Stages]:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=not console.is_terminal, disable=not visible) as bar:
        yield Stages(bar)
