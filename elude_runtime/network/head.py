"""A linear probe in a file becomes the classifier of a timm model, so that the checkpoint needs nothing new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import load_weights, misfit
from elude_runtime.network.weights import read_weights

# How far logits may lie from weight @ embedding, over the largest; another function is off by the order of 1.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Probe:
    """logits = weight @ embedding + bias: weight [K, D], bias [K]."""

    weight: Tensor
    bias: Tensor
    source: str

    @property
    def classes(self) -> int:
        return self.weight.shape[0]


def read_probe(path: Path) -> Probe:
    """A linear probe from a safetensors file or a PyTorch state dict: one tensor `…weight` [K, D] and, if it has one,
    a bias [K]. ModelError for anything more or less."""
    tensors = read_weights(path)
    weights = [n for n, t in tensors.items() if n.rpartition(".")[2] == "weight" and t.dim() == 2]
    biases = [n for n, t in tensors.items() if n.rpartition(".")[2] == "bias" and t.dim() == 1]
    if len(weights) != 1 or len(biases) > 1 or len(tensors) != len(weights) + len(biases):
        found = ", ".join(f"{n} {list(t.shape)}" for n, t in list(tensors.items())[:4])
        raise ModelError(
            f"{path} is not a linear probe: it takes one weight [classes, features] and at most one bias [classes], "
            f"and this holds {found}{', …' if len(tensors) > 4 else ''}."
        )
    weight = tensors[weights[0]]
    bias = tensors[biases[0]] if biases else torch.zeros(len(weight), dtype=weight.dtype)
    if not weight.is_floating_point() or not len(weight) or bias.shape != weight.shape[:1]:
        raise ModelError(
            f"{path} is not a linear probe: its weight is {list(weight.shape)} and its bias {list(bias.shape)}."
        )
    return Probe(weight, bias, str(path))


def with_probe(
    build: Callable[[int | None], nn.Module],
    bare: nn.Module,
    probe: Probe,
    input_size: tuple[int, int, int],
    notes: list[str],
) -> nn.Module:
    """The model with K classes whose body is that of `bare` (num_classes=0) and whose classifier is the probe.

    build(K): the model without weights. ModelError where its classifier is not one linear map of the embedding of the
    probe's width, compared on two random images of `input_size`.
    """
    embedding = embed(bare, input_size)
    features, dtype = embedding.shape[1], embedding.dtype
    if probe.weight.shape[1] != features:
        raise ModelError(
            f"The probe {probe.source} reads {probe.weight.shape[1]} features and the embedding has {features}; give a "
            "probe that was trained on this model's output without a head."
        )
    weight, bias = probe.weight.to(dtype), probe.bias.to(dtype)
    model = build(probe.classes)
    if not _put(model, bare, weight, bias) or not _close(embed(model, input_size), F.linear(embedding, weight), bias):
        raise ModelError(
            f"The classifier of {type(bare).__name__} is not one linear map of its embedding, so a probe cannot take "
            "its place; build the model with its head in a --model-factory."
        )
    if not all(torch.equal(t.to(dtype).to(t.dtype), t) for t in (probe.weight, probe.bias)):
        notes.append(f"The numbers of {probe.source} were rounded to {str(dtype).removeprefix('torch.')}, the body's.")
    return model


def _put(model: Any, bare: nn.Module, weight: Tensor, bias: Tensor) -> bool:
    """Load the body and the classifier; False where they are not the whole model."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    name = next((n for n, m in model.named_modules() if m is classifier), None)
    if name is None or not isinstance(classifier, nn.Linear | nn.Conv2d) or classifier.weight.numel() != weight.numel():
        return False
    state = {**bare.state_dict(), f"{name}.weight": weight.reshape(classifier.weight.shape)}
    if classifier.bias is not None:
        state[f"{name}.bias"] = bias
    if misfit(model, state):
        return False
    load_weights(model, state, "the probe")
    return True


def _close(found: Tensor, product: Tensor, bias: Tensor) -> bool:
    """Whether logits are product + bias but for rounding, also where the product is small beside the bias."""
    expected = product + bias
    if found.shape != expected.shape:
        return False
    bound = _ROUNDING[found.dtype] * product.abs().max() + 4 * torch.finfo(found.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= bound).all())


@torch.no_grad()
def embed(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """The output of a model in eval mode for two random images, the same in every call."""
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    out = model(images.to(next(model.parameters()).dtype))
    if not isinstance(out, Tensor) or out.dim() != 2:
        raise ModelError("The model's output is not one embedding an image; a probe needs a pooled one.")
    return out
