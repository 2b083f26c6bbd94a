"""Every command that the README and the changelog name exists, with the options it is shown with, or is to come."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from elude_runtime.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CHANGELOG.md")
TO_COME: set[str] = set()
"""Named in the README as to come; what is built leaves this list."""
_NAMED = re.compile(r"\belude(?: |\n(?!\n))([a-z][a-z-]*)")  # a line may end in between, a paragraph may not
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_TYPED = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def commands(group: Any) -> dict[str, Any]:
    """The commands of a group; none where it is a command itself."""
    return dict(getattr(group, "commands", {}))


def calls(text: str) -> Iterator[list[str]]:
    """The words after `elude` of every command line, in a code span or behind a prompt."""
    for line in (*_SPAN.findall(text), *_TYPED.findall(text)):
        head, name, rest = line.replace("\\\n", " ").replace("\n", " ").partition("elude ")
        if name and (not head or head.endswith(("/", " "))):
            yield rest.split(" | ")[0].split()


@pytest.fixture(scope="module")
def offered() -> dict[str, Any]:
    return commands(typer.main.get_command(app))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_named_exists(document: str, offered: dict[str, Any]) -> None:
    named = set(_NAMED.findall(text_of(document)))
    assert len(named) > 10 and "activations" in named
    assert named - set(offered) == (TO_COME if document == "README.md" else set())


def test_what_is_to_come_is_what_the_readme_says_is(offered: dict[str, Any]) -> None:
    said = re.findall(r"`elude ([a-z-]+)`\s+(?:is|are)\s+to\s+come", text_of("README.md"))
    assert set(said) == TO_COME and not TO_COME & set(offered)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_call_shown_is_one(document: str, offered: dict[str, Any]) -> None:
    """Sub-commands and options, of those commands that exist."""
    seen = 0
    for words in calls(text_of(document)):
        name = words.pop(0)
        if name in TO_COME:
            continue
        command = offered[name]
        if words and commands(command):
            for one in words.pop(0).split("|"):
                assert one in commands(command), f"elude {name} {one}"
                command = commands(command)[one]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"elude {name} {word}"
                seen += 1
    assert seen > (15 if document == "README.md" else -1)
