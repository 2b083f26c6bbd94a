"""deploy/problems.md: lists every problem type with its status, and is right about TorchServe's own errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.reply import ProblemDocument
from elude_runtime.client.problems import SERVER_PROBLEMS, problem_of

PAGE = (Path(__file__).resolve().parent.parent / "deploy" / "problems.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


def test_every_problem_with_its_status() -> None:
    rows = table("The service's own")
    assert {row[0]: int(row[1]) for row in rows} == {kind: status for kind, (status, _) in PROBLEMS.items()}
    assert [row[0] for row in rows] == list(PROBLEMS), "the order is the statuses'"
    assert all(len(row) == 4 and len(row[2]) > 20 and len(row[3]) > 20 for row in rows)


def test_every_problem_of_the_client() -> None:
    assert {row[0] for row in table("One family in the client")} == set(SERVER_PROBLEMS)


@pytest.mark.parametrize("row", table("TorchServe's own"), ids=lambda row: f"{row[0]}-{row[1]}")
def test_what_the_client_makes_of_torchserves_own(row: list[str]) -> None:
    status, exception, _, expected = row
    body = "" if "no body" in exception else json.dumps({"code": int(status), "type": exception, "message": "x"})
    assert problem_of(httpx.Response(int(status), text=body)).type == expected


def test_the_example_is_a_problem_document() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    document = ProblemDocument.model_validate_json(example)
    assert PROBLEMS[document.type] == (document.status, document.title)
