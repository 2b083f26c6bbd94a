"""Precision by configuration: predictions are the base model's under the same policy, and all else still works."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, encoded, picture
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.api.config import ConfigError, ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.precision import run_under_autocast, set_tf32
from elude_runtime.errors import SettingsError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.preprocessing import decode_image

PLAIN = {"tf32": False, "autocast": None, "compiled": False, "compiled_difference": None}
FORM = "multipart/form-data"
IMAGES = [encoded(picture(300 + number)) for number in range(4)]
EDITS = [
    {"feature": f"{FIRST}/P0", "mode": "ablate"},
    {"feature": f"{FIRST}/P1", "mode": "scale", "value": -9},
    {"feature": f"{SECOND}/P1", "mode": "scale", "value": -9},
]
EDIT = {"edits": EDITS, "conflict": "last"}
WISHES: list[dict] = [
    {},
    {"explain": {"method": "integrated_gradients", "effects": True, "heatmaps": "values"}},
    {"steer": EDIT, "activations": {"features": [f"{SECOND}/P0"]}},
    {"explain": {"method": "ablation", "level": "subunits"}, "steer": EDIT},
]


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def answers(engine: Engine, wishes: list[dict]) -> list[dict]:
    rows = [
        Row({"image": image, "request": json.dumps({"top_k": 7, **wish}).encode()}, FORM, False, "", "r")
        for image, wish in zip(IMAGES, wishes, strict=True)
    ]
    return [json.loads(answered.body) for answered in engine.answer(rows)]


def logits(predictions: list[dict]) -> Tensor:
    return torch.tensor([p["logit"] for p in sorted(predictions, key=lambda p: p["index"])])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("tf32", "autocast"), [(True, None), (False, "bfloat16"), (False, "float16")])
def test_predictions_are_the_base_models_under_the_same_policy(
    rewritten: Rewritten, device: str, tf32: bool, autocast: str | None
) -> None:
    """Of plain rows in a batch of their own, and of all rows in one that is recorded and explained."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    config = ServingConfig(device=device, tf32=tf32, autocast=autocast)
    engine = Engine.open(rewritten.path, config, name="m", version="1")
    transform, base = rewritten.data.transform(), copy.deepcopy(rewritten.base).to(device)
    inputs = torch.stack([transform(decode_image(image)) for image in IMAGES]).to(device)
    with torch.no_grad():
        in_float32 = base(inputs)
        with torch.autocast(device, getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
            expected = base(inputs).float()
    for wishes in ([{}] * 4, [{}, {"explain": {}}, {"explain": {"method": "gradient"}}, {}]):
        for reply, own in zip(answers(engine, wishes), expected.cpu(), strict=True):
            assert torch.equal(logits(reply["predictions"]), own)
    assert torch.equal(in_float32, expected) == (autocast is None), "the policy makes a difference"


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_explanations_and_steering_are_those_of_float32_to_the_types_digits(vit: Rewritten, autocast: str) -> None:
    exact = answers(Engine.open(vit.path, ServingConfig(), name="m", version="1"), WISHES)
    coarse = answers(Engine.open(vit.path, ServingConfig(autocast=autocast), name="m", version="1"), WISHES)
    close = 0.1 if autocast == "bfloat16" else 0.02
    for there, here in zip(exact, coarse, strict=True):
        assert torch.allclose(logits(here["predictions"]), logits(there["predictions"]), atol=close, rtol=close)
        for one, other in zip(there["explanations"] or [], here["explanations"] or [], strict=True):
            assert abs(one["value"] - other["value"]) < close * max(1, abs(one["value"]))
            for layer, same in zip(one["layers"], other["layers"], strict=True):
                known = {f["feature"]: f["attribution"] for f in layer["features"]}
                shared = [f for f in same["features"] if f["feature"] in known]
                assert len(shared) >= len(known) // 2
                scale = max(map(abs, known.values()))
                assert all(abs(f["attribution"] - known[f["feature"]]) < 3 * close * scale for f in shared)
        if there["steered"]:
            changes = [
                torch.tensor([c["change"] for c in sorted(reply["steered"]["changes"], key=lambda c: c["index"])])
                for reply in (there, here)
            ]
            assert torch.allclose(changes[1], changes[0], atol=2 * close, rtol=2 * close)
            assert changes[0].abs().max() > 4 * close, "the edit is too small to tell"


def test_what_is_computed_beside_the_network_is_not_under_autocast(
    vit: Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is computed from within a forward pass, as edits of a later layer are."""
    engine = Engine.open(vit.path, ServingConfig(autocast="bfloat16"), name="m", version="1")
    seen: list[bool] = []
    for kind, name in ((SplitState, "concept_activations"), (SplitState, "sums"), (LinearMap, "apply")):
        original = getattr(kind, name)

        def watched(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return _original(*args, **kwargs)

        monkeypatch.setattr(kind, name, watched)
    when = {"feature": f"{SECOND}/P0", "op": ">", "value": -1e9}
    later = {"edits": [EDITS[0], {**EDITS[2], "when": when}]}
    found = answers(engine, [*WISHES[1:], {"steer": later, "explain": {}}])
    assert all(reply["answer"] for reply in found)
    assert seen and not any(seen)


def test_an_edit_that_changes_nothing_gives_the_unedited_row(vit: Rewritten) -> None:
    engine = Engine.open(vit.path, ServingConfig(autocast="bfloat16"), name="m", version="1")
    steer = {"edits": [{"feature": f"{FIRST}/P0", "mode": "scale", "value": 1.0}]}
    for reply in answers(engine, [{"steer": steer}] * 4):
        assert logits(reply["steered"]["predictions"]).equal(logits(reply["predictions"]))


def test_it_is_said(vit: Rewritten, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("high")  # as TorchServe's base handler leaves it
    with caplog.at_level(logging.INFO, "elude_runtime.api.precision"):
        engine = Engine.open(vit.path, ServingConfig(autocast="bfloat16"), name="m", version="1")
    assert engine.describe()["precision"] == {**PLAIN, "autocast": "bfloat16"}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert "TF32 is off" in caplog.text and "autocast to bfloat16" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "elude_runtime.api.precision"):
        set_tf32(False)
        assert not caplog.text  # nothing was changed
        plain = Engine.open(vit.path, ServingConfig(tf32=True), name="m", version="1")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    assert plain.describe()["precision"] == {**PLAIN, "tf32": True} and "TF32 is on" in caplog.text


def test_a_copy_keeps_the_policy_and_its_own_weights(vit: Rewritten) -> None:
    model = copy.deepcopy(vit.base)
    run_under_autocast(model, "bfloat16")
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert other(vit.images).dtype == torch.bfloat16
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.equal(other(vit.images), model(vit.images))
    assert isinstance(other, type(vit.base)) and type(other).__name__ == type(vit.base).__name__


def test_what_cannot_be_is_one_sentence(vit: Rewritten) -> None:
    with pytest.raises(SettingsError, match="this one is in bfloat16; leave `autocast` out"):
        run_under_autocast(copy.deepcopy(vit.base).bfloat16(), "float16")
    with pytest.raises(ConfigError, match="`autocast` cannot be used"):
        ServingConfig.resolve({"autocast": "float8"})
    assert ServingConfig.resolve({}, {"ELUDE_AUTOCAST": "bfloat16", "ELUDE_TF32": "true"}).tf32 is True
