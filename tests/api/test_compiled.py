"""Predictions by torch.compile: the compiled base model's bits, whatever else is asked; the rest starts from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, encoded, needs_compiler, picture
from torch import Tensor, nn

from elude_runtime.analysis.features import Feature
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

        def count(feature: Feature, buckets: Any, found: dict[str, Any] = found) -> None:
            found[feature.name] = found.get(feature.name, 0) + buckets

        drift = DriftWatch(one.model, groups, 0.5, count, int, seed=1)
        one.watch = drift
        try:
            ask(one, {}, {"explain": {}}, {}, {})
            ask(one, {}, {}, {})
        finally:
            one.watch = None
            drift.close()
        counted[compiled] = {name: numbers.tolist() for name, numbers in found.items()}
    assert counted[True] == counted[False]
    (images,) = {sum(numbers) for numbers in counted[True].values()}
    assert 0 < images < 7


@needs_compiler
def test_a_failed_look_costs_no_answer(
    engine: Engine, expected: Callable[[int], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    class Watch:
        def sampled(self, images: int) -> list[int]:
            return list(range(images))

        @contextmanager
        def looking(self, rows: list[int], images: int) -> Iterator[None]:
            raise RuntimeError("planted")
            yield

    engine.watch = Watch()
    try:
        replies = ask(engine, {}, {"explain": {}})
    finally:
        engine.watch = None
    assert all(torch.equal(logits(reply), own) for reply, own in zip(replies, expected(2), strict=True))
    assert replies[1]["explanations"] and "a pass for drift failed" in caplog.text


@needs_compiler
@pytest.mark.parametrize("other", [{}, {"explain": {}}, {"steer": ABLATE}])
def test_steering_without_edits_gets_its_own_prediction(engine: Engine, other: dict) -> None:
    """Whoever stands beside it in the batch."""
    for wishes in ([{"steer": {}}], [other, {"steer": {}}], [{"steer": {}}, other]):
        replies = ask(engine, *wishes)
        for reply, wish in zip(replies, wishes, strict=True):
            if wish == {"steer": {}}:
                assert reply["steered"] is None or logits(reply["steered"]).equal(logits(reply))
                for change in reply["steered"]["changes"] if reply["steered"] else []:
                    assert change["default"] == pytest.approx(logits(reply)[change["index"]].item(), abs=1e-5)


@needs_compiler
def test_with_autocast_and_policies_in_force(vit: Rewritten) -> None:
    policy = {"partition_sha256": vit.model.manifest.partition_sha256, "edits": ABLATE["edits"]}
    config = {"autocast": "bfloat16", "policies": {"p": policy}, "default_policies": ["p"], "shadow_policies": []}
    plain, both = (
        Engine.open(vit.path, ServingConfig.model_validate({**config, "compile": on}), name="m", version="1")
        for on in (False, True)
    )
    for here, there in zip(ask(both, {}, {"explain": {}}), ask(plain, {}, {"explain": {}}), strict=True):
        assert here["answer"] == there["answer"] and here["answer"]["policies"]
        assert torch.allclose(logits(here), logits(there), atol=0.1)
        assert torch.equal(changes(here), changes(there)), "the tails are the plain network's"


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
def test_a_batch_without_a_program_waits_for_no_compiler(
    engine: Engine, vit: Rewritten, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.compiled is not None
    with torch.inference_mode():
        other = vit.images.double()[:2]
        with pytest.raises(RuntimeError, match="should be the same"):  # as the network itself answers
            engine.compiled(other)
        transposed = vit.images.transpose(2, 3)  # strides that no program was made for
        for _ in range(2):
            assert torch.equal(engine.compiled(transposed), engine.model.base(transposed))
    assert caplog.text.count("it runs uncompiled") == 1
    with pytest.raises(RuntimeError):
        engine.compiled.run(transposed)


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
        (lambda model, **_: lambda x: [][1], "cannot compile this model here .*C\\+\\+ compiler.* Leave `compile` out"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    vit: Rewritten, monkeypatch: pytest.MonkeyPatch, compiler: Callable, sentence: str
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(SettingsError, match=sentence):
        CompiledNetwork(vit.base, vit.data.input_size)


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_compiler_that_is_switched_off_is_named(vit: Rewritten, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(SettingsError, match=f"switched off, by {switch}"):
        CompiledNetwork(vit.base, vit.data.input_size)


@needs_compiler
def test_a_network_that_needs_a_program_for_each_size_gets_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.of(x.flatten(1)) * (2 if len(x) < 6 else 3)

    model, images = Branching(), torch.randn(8, 3, 2, 2)
    compiled = CompiledNetwork(model, (3, 2, 2))
    for count in (2, 8):
        with torch.no_grad():
            assert torch.allclose(compiled.run(images[:count]), model(images[:count]), atol=1e-5)


def test_an_older_torch_is_named(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(SettingsError, match="needs torch 2.6 or later"):
        CompiledNetwork(vit.base, vit.data.input_size)
