"""A loaded checkpoint as a model: predictions bit for bit, sub-units and concepts beside them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS, VIT_DATA, input_tensor, naive_sums, tiny_vit
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import FeatureError, LayerError, SettingsError


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_predictions_are_the_base_models_bit_for_bit(rewritten: Rewritten, batch: int) -> None:
    r = rewritten
    loaded = elude.load(r.path)
    x = r.images[:batch]
    expected = r.base(x)
    for found in (loaded(x), loaded.record(x).logits, r.model(x), loaded.record(x, []).logits):
        assert torch.equal(found, expected)


def test_an_embedding_model(headless: Rewritten) -> None:
    assert headless.model.manifest.output == "embedding"
    assert torch.equal(headless.model(headless.images), headless.base(headless.images))


def layer_input(r: Rewritten, layer: str) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    hook = dict(r.base.named_modules())[layer].register_forward_hook(lambda _, a, out: seen.extend([a[0], out]))
    with torch.no_grad():
        r.base(r.images)
    hook.remove()
    return seen[0], seen[1]


def test_subunits_are_the_layers_own_edges(rewritten: Rewritten) -> None:
    r = rewritten
    for layer in r.model.layers:
        state = r.model.state(layer)
        module = dict(r.base.named_modules())[layer]
        x, y = layer_input(r, layer)
        found = r.model.subunits(r.images, layer)
        d, m = module.weight.shape[0], state.partition.subunits
        assert found.shape == (3, state.layout.total, d, m + 1) and found.dtype == torch.float32
        torch.testing.assert_close(found, naive_sums(module, state.layout, state.partition, x), rtol=1e-3, atol=1e-4)
        total = found.sum(-1) + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(total, y.flatten(2).transpose(1, 2) if y.dim() == 4 else y, rtol=1e-4, atol=1e-4)


def test_concepts_stand_on_their_own_tokens(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    state, names = r.model.state(layer), r.model.concept_names(layer)
    found = r.model.concepts(r.images, layer)
    assert found.shape == (3, state.layout.total, len(names))
    for column, name in enumerate(names):
        feature = r.model.feature(name)
        outside = torch.ones(state.layout.total, dtype=torch.bool)
        outside[state.layout.slices[feature.token_type]] = False
        assert bool((found[:, outside, column] == 0).all())


def test_layers_are_in_network_order_whatever_was_asked(vit: Rewritten) -> None:
    assert vit.model.layers == [FIRST, SECOND]


def test_layers_that_are_not_split(vit: Rewritten) -> None:
    for call in (vit.model.subunits, vit.model.concepts):
        with pytest.raises(LayerError, match=r"no split layer 'blocks\.1\.mlp\.fc1'"):
            call(vit.images, "blocks.1.mlp.fc1")


def test_a_device_that_is_not_there(vit: Rewritten) -> None:
    with pytest.raises(SettingsError, match="no device 'warp'"):
        elude.load(vit.path, "warp")


def test_parameters_ask_for_no_gradients(vit: Rewritten) -> None:
    loaded = elude.load(vit.path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_last_block_serves_the_class_token_only(tmp_path: Path, vit: Rewritten) -> None:
    from pathlib import Path

    out = Path(str(tmp_path)) / "ckpt"
    model = elude.rewrite(
        vit.base,
        vit.images,
        out=out,
        layers=["blocks.2.mlp.fc2"],
        subunits=2,
        concepts=2,
        tokens=4,
        data_config=vit.data,
        model_args=VIT_ARGS,
    )
    layer = model.layers[0]
    assert model.state(layer).live_types == [1]
    assert all("/C" in n for n in model.concept_names(layer))
    for f in model.explain(vit.images[:1], [0], method="gradient")[0][0].layers[0].features:
        assert f.feature.token_type == 1
    with pytest.raises(FeatureError, match="no effect"):
        model.feature(f"{layer}/P0")
    assert bool(torch.isfinite(model.subunits(vit.images, layer)).all())


def test_looking_at_features_plans_no_tails(rewritten: Rewritten) -> None:
    loaded = elude.load(rewritten.path)
    loaded.subunits(rewritten.images, rewritten.layer)
    loaded.concepts(rewritten.images, rewritten.layer)
    assert "tails" not in vars(loaded)
    loaded.explain(rewritten.images[:1], [0])
    assert "tails" in vars(loaded)


def attributions(model: EludeModel, images: Tensor) -> list[float]:
    explained = model.explain(images[:2], [0, 1], method="integrated_gradients")
    return [f.attribution for image in explained for e in image for layer in e.layers for f in layer.features]


def test_everything_works_in_inference_mode(vit: Rewritten, tmp_path: Path) -> None:
    expected, base = attributions(vit.model, vit.images), tiny_vit()
    with torch.inference_mode():
        loaded = elude.load(vit.path)
        assert attributions(loaded, vit.images.clone()) == expected
        made = elude.rewrite(
            base, input_tensor(VIT_DATA, 8, 0), out=tmp_path / "ckpt", layers=[SECOND], subunits=2, concepts=2,
            tokens=8, data_config=VIT_DATA, model_args=VIT_ARGS,
        )  # fmt: skip
    assert attributions(loaded, vit.images) == expected
    assert made.manifest.layers[0].attribution.images == 8 and attributions(made, vit.images)


def test_a_model_that_recomputes_its_activations(vit: Rewritten, tmp_path: Path) -> None:
    """timm's gradient checkpointing runs blocks again in the backward pass, when nothing is replaced any more."""
    base = tiny_vit()
    base.set_grad_checkpointing(True)
    made = elude.rewrite(
        base, vit.folder, out=tmp_path / "ckpt", layers=[SECOND, FIRST], subunits=4, concepts=6, tokens=24,
        batch_size=8, data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    assert [e.attribution for e in made.manifest.layers] == [e.attribution for e in vit.model.manifest.layers]
    assert base.grad_checkpointing is True
    direct = EludeModel(base, made.manifest, {s.name: s.partition for s in vit.model.states.values()})
    assert attributions(direct, vit.images) == attributions(vit.model, vit.images)


def test_threads_take_turns(vit: Rewritten) -> None:
    loaded = elude.load(vit.path)
    expected, explained = vit.base(vit.images), attributions(vit.model, vit.images)
    sums = vit.model.subunits(vit.images, SECOND)
    stop, wrong = threading.Event(), []

    def predict() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(loaded(vit.images), expected):
                    wrong.append("prediction")

    def look() -> None:
        while not stop.is_set():
            if not torch.equal(loaded.subunits(vit.images, SECOND), sums):
                wrong.append("sub-units")

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(task,)) for task in (predict, look)]
    for thread in threads:
        thread.start()
    try:
        found = [attributions(loaded, vit.images) for _ in range(8)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong and found == [explained] * 8


def test_it_can_be_copied_and_pickled(vit: Rewritten) -> None:
    expected = attributions(vit.model, vit.images)
    for again in (copy.deepcopy(vit.model), pickle.loads(pickle.dumps(elude.load(vit.path)))):
        assert torch.equal(again(vit.images), vit.model(vit.images))
        assert attributions(again, vit.images) == expected
