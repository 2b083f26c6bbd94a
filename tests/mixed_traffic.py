"""Requests of every kind for one served checkpoint, each with what has to come back: right, strange, bad, poisoned."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import httpx
from api_faults import faults
from api_strategies import World
from bad_input import TABLE, VIT_MODEL, Input, b64

from elude_runtime.api.engine import Engine
from elude_runtime.network.preprocessing import decode_image, to_input

JSON, MULTIPART = "application/json", "multipart/form-data"
POLICY, VECTOR = "calm", "waves"  # what the served checkpoint has to hold beside its tensors
FORGED = "Forged"
_ID = "the-identity-of-this-request"  # replaced by one of its own, of the same length, whenever it is sent
_FORGERY = f"a\n[METRICS]{FORGED}.Count:1|#Level:Host|#hostname:h,1,1"


@dataclass(frozen=True)
class Asked:
    """One request. costly: a batch may have no room for it (503); status, problem: of its answer; expected: the JSON of
    a 200, without what differs from one time to the next; own: it has an identity, which has to come back."""

    kind: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    problem: str = ""
    expected: Any = None
    costly: bool = False

    @property
    def own(self) -> bool:
        return _ID.encode() in self.body

    def sent(self, identity: str) -> bytes:
        """The body under this identity."""
        return self.body.replace(_ID.encode(), identity.rjust(len(_ID), "-").encode())

    def fault(self, identity: str, status: int, headers: Mapping[str, str], body: bytes) -> str:
        """What is wrong with an answer; "" for nothing."""
        if status == 503 and self.costly and b'"overloaded"' in body and int(headers.get("retry-after", 0)) > 0:
            return ""
        if status != self.status:
            return f"{self.kind}: {status} instead of {self.status}: {body[:300]!r}"
        if self.problem:
            said = json.loads(body)
            kind = said.get("type")
            return "" if (kind, b"Traceback" in body) == (self.problem, False) else f"{self.kind}: {body[:300]!r}"
        if self.own and identity.encode() not in body:
            return f"{self.kind}: the answer is another request's: {body[:300]!r}"
        where = difference(_content(json.loads(body)), self.expected)
        return f"{self.kind}: differs from the engine's answer at {where}" if where else ""


def difference(found: Any, expected: Any, place: str = "reply") -> str:
    """Where two documents differ by more than what the shape of a batch does to floats; "" for nowhere.

    Lists of features are compared by the features' names: two of nearly the same weight may change places.
    """
    if isinstance(expected, float) and isinstance(found, int | float):
        return "" if math.isclose(found, expected, rel_tol=2e-3, abs_tol=2e-4) else f"{place}: {found} for {expected}"
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return next((d for k in expected if (d := difference(found[k], expected[k], f"{place}.{k}"))), "")
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        if expected and all(isinstance(e, dict) and "feature" in e for e in [*expected, *found]):
            found, expected = ({e["feature"]: e for e in each} for each in (found, expected))
            return difference(found, expected, place)
        pairs = enumerate(zip(found, expected, strict=True))
        return next((d for n, (f, e) in pairs if (d := difference(f, e, f"{place}.{n}"))), "")
    return "" if found == expected else f"{place}: {str(found)[:80]} for {str(expected)[:80]}"


def _content(document: Any) -> Any:
    """Without ids, times and the size of the batch; the documents of KServe V2, which are text, read."""
    if isinstance(document, dict):
        kept = {k: v for k, v in document.items() if k not in ("id", "timing_ms", "batch_size", "since")}
        if kept.get("datatype") == "BYTES":
            kept["data"] = [json.loads(text) for text in kept["data"]]
        return {k: _content(v) for k, v in kept.items()}
    return [_content(v) for v in document] if isinstance(document, list) else document


class Traffic:
    """All requests to one checkpoint. engine: the same checkpoint in this process, which says what is right; images:
    encoded, told apart by their predictions."""

    def __init__(self, engine: Engine, images: Sequence[bytes]) -> None:
        self._engine, self._name = engine, engine.info.name
        self.good = {kind: [one for image in images for one in [self._good(kind, make, image)]]
                     for kind, make in _kinds(engine, list(images)).items()}  # fmt: skip
        self._image = images[0]

    @cached_property
    def bad(self) -> list[Asked]:
        """Every bad, strange and poisoned request."""
        return [*self._table(), *self._faults(), *self._poison(self._image)]

    def drawn(self, seed: int, bad: float = 0.05) -> Iterator[Asked]:
        """An endless mix, the same for the same seed. bad: the share that is drawn from the bad and strange ones."""
        draw = random.Random(seed)
        kinds, weights = zip(*((kind, WEIGHTS[kind]) for kind in self.good), strict=True)
        while True:
            if draw.random() < bad:
                yield draw.choice(self.bad)
            else:
                yield draw.choice(self.good[draw.choices(kinds, weights)[0]])

    @property
    def once(self) -> list[Asked]:
        """Every request of it, once."""
        return [*(one for several in self.good.values() for one in several), *self.bad]

    def _good(self, kind: str, make: Callable[[bytes], Input], image: bytes) -> Asked:
        made = make(image)
        row = (replace(made, route="") if made.route.startswith("/") else made).row()  # KServe's paths stand for none
        answered = self._engine.answer([row])[0]
        assert answered.status == 200, (kind, answered.body)
        return self._asked(kind, made, expected=_content(json.loads(answered.body)), costly=kind in COSTLY)

    def _asked(self, kind: str, made: Input, **more: Any) -> Asked:
        """The request as bytes."""
        verb = "explanations" if made.explain else "predictions"
        path = made.route if made.route.startswith("/") else f"/{verb}/{self._name}/1.0/{made.route}".rstrip("/")
        if made.parts is None:
            headers = {**({"Content-Type": made.content_type} if made.content_type else {}), **made.headers}
            return Asked(kind, path, made.body or b"", headers, **more)
        types = {"image": "image/png", "request": JSON, "extra": "text/plain"}
        files = {name: (name, data, types[name]) for name, data in made.parts.items()}
        request = httpx.Request("POST", "http://x/", files=files)
        return Asked(kind, path, request.read(), {"Content-Type": request.headers["content-type"]}, **more)

    def _table(self) -> Iterator[Asked]:
        """The table of bad and strange input, but what is about the names and sizes of its own models."""
        for case in TABLE:
            if case.model != VIT_MODEL:
                continue
            answered = self._engine.answer([case.row()])[0]
            kind = json.loads(answered.body)["type"] if answered.status != 200 else ""
            if (answered.status, kind) == (case.status, case.kind):
                expected = None if case.kind else _content(json.loads(answered.body))
                yield self._asked(case.name, case, status=case.status, problem=case.kind, expected=expected)

    def _faults(self) -> Iterator[Asked]:
        """Documents with one fault each, made for this checkpoint."""
        image = self.good["json"][0].body
        status = {"other-checkpoint": 412}
        for kind, several in faults(World.of(self._engine)).items():
            for number, fault in enumerate(several):
                # a model without a class token has no use for an edit on it, and none of its own to put there
                body = json.dumps({**json.loads(image), **fault}).encode()
                made = Input(f"{kind} {number}", body, JSON, status.get(kind, 422), kind)
                if json.loads(self._engine.answer([made.row()])[0].body).get("type") == kind:
                    yield self._asked(made.name, made, status=made.status, problem=kind)

    def _poison(self, image: bytes) -> Iterator[Asked]:
        """What has killed a worker, a batch or a metric, or would: found in the front end's habits."""
        feature = World.of(self._engine).patch[0]
        far = {"steer": {"edits": [{"feature": feature, "mode": "set", "value": 3e38}], "strength_multiplier": 3e38}}
        forged = {"steer": {"edits": [{"feature": _FORGERY, "mode": "ablate"}]}}
        # as large as the server's limit lets it become, and beyond
        maps = {"level": "subunits", "method": "gradient", "top_features": 200, "heatmaps": "values"}
        large = {"instances": [{"image": b64(image), "explain": maps}] * 12}
        for name, document, status, kind in (
            ("numbers that leave float32", {"image": b64(image), **far}, 500, "non-finite-output"),
            ("a metric forged by a feature's name", {"image": b64(image), **forged}, 422, "unknown-feature"),
            ("a metric forged by an operation", {"op": _FORGERY}, 404, "unknown-route"),
            ("an oversize reply", large, 422, "response-too-large"),
        ):
            made = Input(name, json.dumps(document).encode(), JSON, status, kind)
            yield self._asked(name, made, status=status, problem=kind, costly=kind == "response-too-large")
        form = Input("an image declared as a web form", image, "application/x-www-form-urlencoded")
        # TorchServe takes it apart itself, and refuses it in its own words
        yield self._asked(form.name, form, status=500, problem="ErrorDataDecoderException")


# of the good requests, in hundredths
WEIGHTS = {
    "raw": 30, "json": 9, "multipart": 8, "gradient": 9, "explanations verb": 4, "integrated gradients": 5,
    "ablation": 2, "steering": 8, "policy and vector": 4, "activations": 5, "features": 4, "vectors": 2, "describe": 1,
    "KServe V1": 4, "KServe V2 bytes": 3, "KServe V2 numbers": 2,
}  # fmt: skip
COSTLY = {"gradient", "explanations verb", "integrated gradients", "ablation", "steering", "policy and vector",
          "vectors", "KServe V1", "KServe V2 bytes"}  # fmt: skip


def _kinds(engine: Engine, images: list[bytes]) -> dict[str, Callable[[bytes], Input]]:
    """How a request of each kind is made of an image."""
    world = World.of(engine)
    feature, layer = world.patch[1], world.layers[0]
    edits = [{"feature": feature, "mode": "scale", "value": -1.0}, {"feature": world.patch[2], "mode": "ablate"}]
    url = f"/v1/models/{engine.info.name}", f"/v2/models/{engine.info.name}"

    def document(values: Mapping[str, Any], route: str = "", *, explain: bool = False) -> Input:
        return Input("", json.dumps({"id": _ID, **values}).encode(), JSON, route=route, explain=explain)

    def about(**more: Any) -> Callable[[bytes], Input]:
        return lambda image: document({"image": b64(image), **more})

    def after(image: bytes, count: int) -> list[bytes]:
        """Some images, from this one on."""
        start = images.index(image)
        return [images[(start + k) % len(images)] for k in range(count)]

    def numbers(image: bytes) -> Input:
        values = to_input(decode_image(image), engine.transform)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, *values.shape], "data": values.flatten().tolist()}
        return document({"inputs": [tensor]}, f"{url[1]}/infer")

    def encoded(image: bytes) -> Input:
        given = {"name": "x", "datatype": "BYTES", "shape": [2], "data": [b64(i)["b64"] for i in after(image, 2)]}
        elude = {"explain": {"top_features": 2, "method": "gradient"}}
        return document({"inputs": [given], "parameters": {"elude": elude}}, f"{url[1]}/infer")

    def instances(image: bytes) -> Input:
        first, second = after(image, 2)
        steered = {"image": b64(second), "steer": {"edits": edits}}
        return Input("", json.dumps({"instances": [b64(first), steered]}).encode(), JSON, route=f"{url[0]}:predict")

    def sets(image: bytes) -> Input:
        chosen = [b64(i) for i in after(image, 4)]
        return document({"layer": layer, "positive": chosen[:2], "negative": chosen[2:], "op": "vectors"})

    def multipart(image: bytes) -> Input:
        request = json.dumps({"id": _ID, "top_k": 2}).encode()
        return Input("", None, MULTIPART, parts={"image": image, "request": request})

    explain = {"top_features": 3}
    return {
        "raw": lambda image: Input("", image, "image/png"),
        "json": about(top_k=3),
        "multipart": multipart,
        "gradient": about(explain={**explain, "method": "gradient", "heatmaps": "values"}),
        "explanations verb": lambda image: document({"image": b64(image), "top_k": 2}, explain=True),
        "integrated gradients": about(explain={**explain, "method": "integrated_gradients", "steps": 4}),
        "ablation": about(explain={"top_features": 4, "method": "ablation"}),
        "steering": about(steer={"edits": edits}, explain={**explain, "method": "gradient"}),
        "policy and vector": about(steer={"policies": [POLICY], "vectors": [{"name": VECTOR, "strength": 0.5}]}),
        "activations": about(activations={"features": list(world.patch[:4]), "reduce": "tokens"}),
        "features": lambda _: document({"limit": 5, "layer": layer, "query": "P1"}, "features"),
        "vectors": sets,
        "describe": lambda _: Input("", b'{"op": "describe"}', JSON),
        "KServe V1": instances,
        "KServe V2 bytes": encoded,
        "KServe V2 numbers": numbers,
    }
