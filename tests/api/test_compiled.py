"""Predictions by torch.compile: the compiled base model's bits, whatever else is asked; the rest starts from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, encoded, needs_compiler, picture
from torch import Tensor, nn

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.errors import SettingsError
from elude_runtime.metrics.drift import DriftWatch, Watched
from elude_runtime.network.compiled import CompiledNetwork
from elude_runtime.network.preprocessing import decode_image

IMAGES = [encoded(picture(300 + number)) for number in range(4)]
ABLATE = {"edits": [{"feature": f"{FIRST}/P0", "mode": "ablate"}, {"feature": f"{SECOND}/P1", "mode": "ablate"}]}
NOTHING = {"edits": [{"feature": f"{FIRST}/P0", "mode": "scale", "value": 1.0}]}


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return Engine.open(vit.path, ServingConfig(compile=True), name="m", version="1")


@pytest.fixture(scope="module")
def plain(vit: Rewritten) -> Engine:
    return Engine.open(vit.path, ServingConfig(), name="m", version="1")


@pytest.fixture(scope="module")
def expected(vit: Rewritten) -> Callable[[int], Tensor]:
    """Logits of the base model, compiled by itself, on so many of the images."""
    run = torch.compile(copy.deepcopy(vit.base), dynamic=True)
    transform = vit.data.transform()
    inputs = torch.stack([transform(decode_image(image)) for image in IMAGES])

    def of(count: int) -> Tensor:
        with torch.inference_mode():
            return run(inputs[:count])

    return of


def ask(engine: Engine, *wishes: dict) -> list[dict[str, Any]]:
    rows = [
        Row({"image": image, "request": json.dumps({"top_k": 7, **w}).encode()}, "multipart/form-data", False, "", "r")
        for image, w in zip(IMAGES, wishes, strict=False)
    ]
    return [json.loads(answered.body) for answered in engine.answer(rows)]


def logits(reply: dict[str, Any]) -> Tensor:
    return torch.tensor([p["logit"] for p in sorted(reply["predictions"], key=lambda p: p["index"])])


def changes(reply: dict[str, Any]) -> Tensor:
    return torch.tensor([c["change"] for c in sorted(reply["steered"]["changes"], key=lambda c: c["index"])])


@needs_compiler
@pytest.mark.parametrize(
    "wishes",
    [
        [{}],
        [{}] * 4,
        [{"explain": {}}, {}, {"steer": ABLATE}, {}],
        [{"explain": {"method": "gradient"}, "steer": ABLATE}] * 4,
        [{"activations": {"features": [f"{SECOND}/P0"]}}, {}],
        [{}] * 3,  # after recorded passes, whose hooks and patches are gone
        [{}],
    ],
)
def test_predictions_are_the_compiled_base_models(
    engine: Engine, plain: Engine, expected: Callable[[int], Tensor], wishes: list[dict]
) -> None:
    replies = ask(engine, *wishes)
    for reply, own in zip(replies, expected(len(wishes)), strict=True):
        assert torch.equal(logits(reply), own)
    without = torch.stack([logits(reply) for reply in ask(plain, *wishes)])
    assert not torch.equal(without, expected(len(wishes))), "compiling changes no digit here: this proves nothing"


@needs_compiler
def test_what_is_told_beside_them_is_the_networks(engine: Engine, plain: Engine) -> None:
    wishes = [{"steer": ABLATE}, {}, {"explain": {"method": "gradient"}, "steer": ABLATE}, {"explain": {}}]
    for here, there in zip(ask(engine, *wishes), ask(plain, *wishes), strict=True):
        for one, other in zip(here["explanations"] or [], there["explanations"] or [], strict=True):
            assert one["value"] == pytest.approx(other["value"], abs=1e-5)
            for layer, same in zip(one["layers"], other["layers"], strict=True):
                known = {f["feature"]: f["attribution"] for f in same["features"]}
                found = {f["feature"]: f["attribution"] for f in layer["features"]}
                assert found.keys() == known.keys()
                scale = max(map(abs, known.values()))
                assert all(abs(found[name] - known[name]) < 1e-4 * scale for name in known)
        if here["steered"]:
            assert torch.allclose(changes(here), changes(there), atol=1e-5)
            assert changes(there).abs().max() > 1e-3


@needs_compiler
def test_an_edit_that_changes_nothing_gives_the_prediction(engine: Engine) -> None:
    for reply in ask(engine, *[{"steer": NOTHING}] * 4):
        assert logits(reply["steered"]).equal(logits(reply)) and not changes(reply).any()


@needs_compiler
def test_drift_sees_the_plain_rows(vit: Rewritten, engine: Engine, plain: Engine) -> None:
    """Of a batch of which one row is explained: counts as without compiling."""
    counted: dict[bool, dict[str, Any]] = {}
    for compiled, one in ((True, engine), (False, plain)):
        features = one.model.state(SECOND).concept_features(1)
        groups = [Watched(features, torch.linspace(-1, 1, 11).repeat(len(features), 1))]
        found: dict[str, Any] = {}
        drift = DriftWatch(one.model, groups, 0.5, lambda f, n, found=found: found.update({f.name: n}), int, seed=1)
        one.watch = drift
        try:
            ask(one, {}, {"explain": {}}, {}, {})
            ask(one, {}, {}, {})
        finally:
            one.watch = None
            drift.close()
        counted[compiled] = {name: numbers.tolist() for name, numbers in found.items()}
    assert counted[True] == counted[False]
    assert {sum(numbers) for numbers in counted[True].values()} <= set(range(1, 7)) and counted[True]


@needs_compiler
def test_the_pass_beside_the_compiled_one_is_counted_as_work(engine: Engine, plain: Engine) -> None:
    def work(one: Engine, wish: dict) -> float:
        row = Row({"image": IMAGES[0], "request": json.dumps(wish).encode()}, "multipart/form-data", False, "", "r")
        (reply,) = one.answer([row])
        assert reply.seen is not None and reply.status == 200
        return reply.seen.work

    for wish in ({"explain": {}}, {"steer": ABLATE}, {"activations": {"features": [f"{SECOND}/P0"]}}):
        assert work(engine, wish) == pytest.approx(work(plain, wish) + 1)
    assert work(engine, {}) == work(plain, {}) == 0


@needs_compiler
def test_it_is_said(engine: Engine) -> None:
    assert engine.compiled is not None and 0 < engine.compiled.difference < 1e-4
    told = engine.describe()["precision"]
    assert told["compiled"] is True and told["compiled_difference"] == engine.compiled.difference
    assert ServingConfig.resolve({}, {"ELUDE_COMPILE": "true"}).compile is True


@needs_compiler
def test_a_batch_without_a_program_waits_for_no_compiler(engine: Engine, vit: Rewritten) -> None:
    assert engine.compiled is not None
    with torch.inference_mode():
        other = vit.images.double()[:2]
        with pytest.raises(RuntimeError, match="should be the same"):  # as the network itself answers
            engine.compiled(other)
        transposed = vit.images.transpose(2, 3)  # strides that no program was made for
        assert torch.equal(engine.compiled(transposed), engine.model.base(transposed))


class _Twice(nn.Module):
    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.of(x)


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        (lambda model, **_: _Twice(model), r"answers otherwise than the model \(a relative difference of 1.0e\+00"),
        (lambda model, **_: lambda x: model(x) * float("nan"), "answers otherwise than the model"),
        (lambda model, **_: lambda x: [][1], "cannot compile this model here .*C\\+\\+ compiler. Leave `compile` out"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    vit: Rewritten, monkeypatch: pytest.MonkeyPatch, compiler: Callable, sentence: str
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(SettingsError, match=sentence):
        CompiledNetwork(vit.base, vit.data.input_size)


def test_an_older_torch_is_named(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(SettingsError, match="needs torch 2.6 or later"):
        CompiledNetwork(vit.base, vit.data.input_size)
