"""What is said of the rewritten demo network's features: the arithmetic by hand, the watermark on the real network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.demo import features as module
from elude_runtime.demo.found import accuracy_by_group, notable
from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS, make_set, to_arrays
from elude_runtime.demo.model import load_demo_model, preprocess
from elude_runtime.demo.rewrite import rewrite_demo, write_calibration
from elude_runtime.network.tail import record_layers

SUSPICIOUS = CLASSES[WATERMARK_CLASS]


def groups(with_mark: dict[str, float], without: dict[str, float]) -> dict[tuple[str, bool], float]:
    return {(c, True): with_mark.get(c, 0.6) for c in CLASSES} | {(c, False): without.get(c, 0.9) for c in CLASSES}


def test_recovery_by_hand() -> None:
    found = module.Recovery(
        groups({"ring": 0.1, "red ball": 0.2, SUSPICIOUS: 0.95}, {"ring": 0.9, SUSPICIOUS: 0.0}),
        groups({"ring": 0.5, "red ball": 0.25, SUSPICIOUS: 0.0}, {"ring": 0.88, "red heart": 0.87, SUSPICIOUS: 0.0}),
    )
    assert found.worst == "ring" and found.recovered == pytest.approx(0.5)  # .4 of a gap of .8
    assert found.worst_after == ("red ball", 0.25)
    assert found.largest_loss == ("red heart", pytest.approx(3.0))


def test_the_suspicious_class_is_no_other_class() -> None:
    found = module.Recovery(groups({SUSPICIOUS: 0.0, "ring": 0.3}, {}), groups({}, {SUSPICIOUS: 0.0}))
    assert found.worst == "ring" and found.largest_loss[1] == pytest.approx(0.0)


def test_notable_features() -> None:
    assert notable([{"a": 2.0, "b": 0.5, "c": 0.1}, {"a": 4.0, "d": 2.2}]) == [("a", 3.0), ("d", 1.1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EludeModel:
    folder = tmp_path_factory.mktemp("demo")
    network, config = load_demo_model()
    write_calibration(folder / "images")
    rewrite_demo(network, config, folder / "images", folder / "ckpt")
    return load(folder / "ckpt")


def test_the_watermark_is_found_and_taken_out(model: EludeModel) -> None:
    found = module.find_watermark(model, make_set(120, 21, "train"), 96)
    assert any(f.tells for f in found)
    samples = make_set(240, 22, "groups")
    recovery = module.recovery(model, found, samples)
    # by a hook on the base network that takes the features' parts out of the layer's output
    features = [model.feature(f.name) for f in found]
    (layer,) = {f.layer for f in features}
    state, (pictures, *_) = model.state(layer), to_arrays(samples)
    x = preprocess(pictures)
    part = state.linear.module
    with torch.no_grad():
        inputs = record_layers(model.base, x, {layer: part}).x[layer]
        taken = torch.stack([state.write(inputs, f) for f in features]).sum(0)
        plain = model.base(x).argmax(1).tolist()
        handle = part.register_forward_hook(lambda _, __, y: y - taken)
        steered = model.base(x).argmax(1).tolist()
        handle.remove()
    for figures, predicted in ((recovery.before, plain), (recovery.after, steered)):
        expected = accuracy_by_group(samples, predicted)
        assert np.allclose([figures[g] for g in expected], [expected[g] for g in expected], atol=0.051)
    assert recovery.recovered > 0.2
    shown = module.recovery_figures(recovery)
    assert shown[f"worst group, {recovery.worst} with watermark"]["share of the gap recovered"] == recovery.recovered


def test_the_calibration_is_the_demos(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "old.png").touch()
    write_calibration(tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 500
