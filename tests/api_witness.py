"""What has to hold for every reply to a generated request, and for the rows beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import api_strategies as gen
import jsonschema
import pytest
from conftest import REPOSITORY

from elude_runtime.api.engine import Answered, Engine, Row
from elude_runtime.api.problems import PROBLEMS

PLAIN = [gen.IMAGES[0], gen.IMAGES[2]]
LEAK = re.compile(r"Traceback|site-packages|File \"|line \d+, in |\.(py|so|safetensors)\b|0x[0-9a-f]{8}")
EXTREME = 1e15  # squares of larger numbers leave float32: only their sender gets a 500


@dataclass
class Tally:
    """What became of generated requests. by_test: statuses; kinds: problems, those inside KServe V1's replies too."""

    kinds: Counter[str] = field(default_factory=Counter)
    by_test: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, test: str, answered: Answered) -> None:
        self.by_test.setdefault(test, Counter())[answered.status] += 1
        self.kinds.update(kinds_of(answered))


def kinds_of(answered: Answered) -> list[str]:
    document = json.loads(answered.body)
    found = [document] if answered.status != 200 else document.get("predictions", [])
    return [one["type"] for one in found if "type" in one]


class Witness:
    """Asks an engine in batches between two plain rows, and looks at all that has to hold whatever is asked."""

    def __init__(self, engine: Engine, tally: Tally) -> None:
        self.engine, self.tally = engine, tally
        self.published = engine.describe()["openapi"]
        self._plain: dict[int, list[Any]] = {}
        self._validators: dict[tuple[str, int], Any] = {}

    def ask(self, test: str, calls: Sequence[gen.Call]) -> list[Answered]:
        before, *found, after = self.engine.answer([plain(0), *(call.row for call in calls), plain(1)])
        for call, answered in zip(calls, found, strict=True):
            self.tally.add(test, answered)
            self.check(call.path, answered)
            if any(PROBLEMS[kind][0] == 500 for kind in kinds_of(answered)):
                assert set(kinds_of(answered)) == {"non-finite-output"}, answered.body
                assert extreme(json.loads(call.row.parts["request" if "image" in call.row.parts else "body"])), call
            if not self.takes(call):
                assert kinds_of(answered), f"{call} is not of the schema and was answered"
        reached = json.loads(before.body)["batch_size"]
        assert [same(before), same(after)] == self._neighbours(reached)
        return found

    def check(self, path: str, answered: Answered) -> None:
        """The reply is one that the schema has for this path and status, and tells nothing of the server's inside."""
        assert not self.errors(path, answered), (answered.body[:500], self.errors(path, answered)[0])
        if answered.status == 200:
            assert answered.content_type == "application/json" and not answered.headers
        else:
            assert answered.content_type == "application/problem+json"
            document = json.loads(answered.body)
            assert PROBLEMS[document["type"]] == (answered.status, document["title"])
            assert not LEAK.search(answered.body) and str(REPOSITORY) not in answered.body, answered.body
            assert len(answered.body) < 20_000
        assert ("Retry-After" in answered.headers) == (answered.status == 503)

    def errors(self, path: str, answered: Answered) -> list[Any]:
        """What in a reply is not as the schema has it."""
        document = json.loads(answered.body, parse_constant=pytest.fail)
        return list(self._validator(path, answered).iter_errors(document))

    def takes(self, call: gen.Call) -> bool:
        """Whether the schema takes the request, where it has a schema to say so: a JSON document."""
        if call.row.content_type != gen.JSON or not call.row.parts["body"]:
            return True
        try:
            document = json.loads(call.row.parts["body"])
        except ValueError:
            return False
        return bool(self._validator(call.path).is_valid(document))

    def _validator(self, path: str, answered: Answered | None = None) -> Any:
        """Of the replies of a path like this one, or of the JSON documents that it takes."""
        template = published_path(path)
        key = template, answered.status if answered else 0
        if key not in self._validators:
            operation = self.published["paths"][template]["post"]
            place = operation["responses"][str(answered.status)] if answered else operation["requestBody"]
            if "$ref" in place:
                place = self.published["components"]["responses"][place["$ref"].rpartition("/")[2]]
            schema = place["content"][answered.content_type if answered else gen.JSON]["schema"]
            whole = {**schema, "components": self.published["components"]}
            self._validators[key] = jsonschema.Draft202012Validator(whole)
        return self._validators[key]

    def _neighbours(self, reached: int) -> list[Any]:
        """The plain rows' replies in a batch of as many rows, all plain."""
        if reached not in self._plain:
            found = self.engine.answer([plain(0), *[plain(1)] * (reached - 1)])
            self._plain[reached] = [same(found[0]), same(found[-1])]
        return self._plain[reached]


def plain(number: int) -> Row:
    return Row({"body": PLAIN[number]}, "image/png", False, "", "r")


def same(answered: Answered) -> dict[str, Any]:
    """A reply without what differs from one request to the next."""
    assert answered.status == 200, answered.body
    return {k: v for k, v in json.loads(answered.body).items() if k not in ("id", "timing_ms")}


def published_path(path: str) -> str:
    """The path as the document writes it."""
    made = re.sub(r"^/(predictions|explanations)/tiny/1\.0", r"/\1/{model}/{version}", path)
    return made.replace("tiny", "{model}")


def extreme(value: Any) -> bool:
    """Whether a document, or one inside it as text, has a number that float32 arithmetic may not carry."""
    if isinstance(value, str) and value[:1] == "{":
        value = json.loads(value)
    if isinstance(value, dict | list):
        return any(map(extreme, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float | int) and abs(value) >= EXTREME


def problem(answered: Answered) -> str:
    """Its type, "" for an answer."""
    return "" if answered.status == 200 else json.loads(answered.body)["type"]


NEAR = {"rel": 1e-3, "abs": 1e-3}


def alike(alone: Any, batched: Any) -> None:
    """Two replies to one request, but for the last digits of their numbers."""
    assert type(alone) is type(batched), (alone, batched)
    if isinstance(alone, dict):
        assert alone.keys() == batched.keys()
        for key, value in alone.items():
            if key not in ("id", "timing_ms", "batch_size", "png", "token"):
                alike(value, batched[key])
    elif isinstance(alone, list):
        assert len(alone) == len(batched)
        for one, other in zip(*map(by_name, (alone, batched)), strict=True):
            alike(one, other)
    elif isinstance(alone, float):
        assert batched == pytest.approx(alone, **NEAR)
    elif isinstance(alone, str) and alone[:1] == "{":
        alike(json.loads(alone), json.loads(batched))
    else:
        assert alone == batched


def by_name(values: list[Any]) -> list[Any]:
    """Sorted by what they are called: of nearly equal ones either may come first."""
    name = next((k for k in ("feature", "index") if values and isinstance(values[0], dict) and k in values[0]), None)
    return sorted(values, key=lambda value: str(value[name])) if name else values
