"""What a model must be like to be looked into: one tensor out, nothing compiled; and given back as it was."""

from __future__ import annotations

import pytest
import torch
from support import VIT_ARGS, TorchEncoder, tiny_vit
from torch import nn

from elude_runtime.errors import ModelError
from elude_runtime.network.conditions import borrowed, output_size
from elude_runtime.offline.base_model import describe_model


class TestOutputSize:
    def test_classes_and_embeddings(self) -> None:
        model = tiny_vit().train()
        assert output_size(model, (3, 32, 32)) == 7 and model.training
        assert output_size(tiny_vit(num_classes=0), (3, 32, 32)) == 32

    def test_types_that_do_not_run_together(self) -> None:
        model = tiny_vit().to(torch.bfloat16)
        model.head.float()
        with pytest.raises(ModelError, match="mixes bfloat16 and float32: save it in one type"):
            output_size(model, (3, 32, 32))

    def test_another_size(self) -> None:
        with pytest.raises(ModelError, match="does not run on images of size .*--input-size"):
            output_size(tiny_vit(), (3, 40, 40))

    def test_images_of_another_number_of_channels(self) -> None:
        with pytest.raises(ModelError, match=r"takes images of 1 channels; .* of 3"):
            output_size(tiny_vit(in_chans=1), (3, 32, 32))

    @pytest.mark.parametrize(
        ("answer", "said"),
        [(lambda x: {"logits": x}, "a dict"), (lambda x: (x, x), "a tuple"), (lambda x: x, r"a tensor \[2, 3, 8, 8\]")],
    )
    def test_what_is_no_row_of_numbers(self, answer: object, said: str) -> None:
        class Other(nn.Conv2d):
            def forward(self, x: torch.Tensor) -> object:
                return answer(super().forward(x))  # type: ignore[operator]

        with pytest.raises(ModelError, match=f"returns {said} .*one tensor"):
            output_size(Other(3, 3, 1), (3, 8, 8))

    def test_a_model_that_answers_otherwise_when_it_is_looked_at(self) -> None:
        """As PyTorch's encoder layer may, by its last bits: it leaves its fused path where there are hooks."""

        class Shy(nn.TransformerEncoderLayer):
            def forward(self, src: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
                return super().forward(src, *args, **kwargs) + (1e-6 if not self._forward_hooks else 0)  # type: ignore[arg-type]

        assert output_size(TorchEncoder(), (3, 4, 4)) == 5
        model = TorchEncoder()
        model.encoder.layers[1] = Shy(16, 2, 32, batch_first=True)
        with pytest.raises(ModelError, match=r"call torch\.backends\.mha\.set_fastpath_enabled\(False\)"):
            output_size(model, (3, 4, 4))
        assert not model.encoder.layers[1]._forward_hooks


COMPILED = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "compiled in place": lambda module: module.compile(backend="eager") or module,
    "its forward compiled": lambda module: (
        setattr(module, "forward", torch.compile(module.forward, backend="eager")) or module
    ),
    "scripted": lambda module: torch.jit.script(module),
    "traced": lambda module: torch.jit.trace(module, torch.zeros(2, 32)),
}


@pytest.mark.parametrize("kind", list(COMPILED))
def test_a_compiled_module_is_refused(kind: str) -> None:
    model = tiny_vit()
    model.blocks[1].mlp.fc2 = nn.Sequential(COMPILED[kind](nn.Linear(32, 32)))
    said = r"The module blocks\.1\.mlp\.fc2\.0 is compiled or scripted; give the model as it is before torch\.compile"
    with pytest.raises(ModelError, match=said), borrowed(model):
        pass


@pytest.mark.parametrize(
    "take",
    [lambda model: output_size(model, (3, 32, 32)), lambda model: describe_model(model, None, VIT_ARGS)],
    ids=["output_size", "describe_model"],
)
def test_a_compiled_model_is_refused(take: object) -> None:
    with pytest.raises(ModelError, match="^The model is compiled or scripted; "):
        take(torch.compile(tiny_vit(), backend="eager"))  # type: ignore[operator]


def test_a_borrowed_model_does_not_recompute_its_activations() -> None:
    model = tiny_vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="planted"), borrowed(model):
        assert model.grad_checkpointing is False
        raise RuntimeError("planted")
    assert model.grad_checkpointing is True


def test_a_borrowed_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with borrowed(model):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad and model.weight.is_inference()
