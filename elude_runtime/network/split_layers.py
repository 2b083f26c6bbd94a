"""Finding split layers by rule: every linear layer of the network as it really runs, offered or with its reason.

What follows a layer is read off the recorded graph of one forward pass (`network.graph`); how its rows and tokens are
laid out, and which of them matter, off a few more passes over chosen pictures (`network.probe`). No list of
architectures, and no names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from elude_runtime.errors import LayerError, ModelError, did_you_mean
from elude_runtime.network.conditions import borrowed, output_size
from elude_runtime.network.graph import Verdict, record_graph
from elude_runtime.network.probe import Pictures, Seen, live_types, observe
from elude_runtime.network.tokens import TokenLayout

_NOT_RECORDED = "The model runs, but its operations cannot be recorded ({}); keep to plain PyTorch in its forward."
_NO_GRADIENTS = (
    "The model runs, but not with gradients ({}); keep no_grad, inference_mode, out= and changes of views in place out "
    "of its forward."
)


@dataclass(frozen=True)
class SplitLayer:
    """A linear layer of the network and whether, and why not, it is offered for splitting.

    reason: what follows the layer, or why it is not offered. live: for each token type, whether any of its tokens can
    change the model's output at all. order: position in the forward pass; layers that do not run come last.
    classifier: its output is the model's. weighted: on its way it is multiplied by attention weights or a gate, which
    do not depend on it. folded: it sees an image in several rows of the batch (windows).
    """

    name: str
    kind: str  # "linear" or "conv"
    neurons: int
    inputs: int
    kernel: tuple[int, ...]
    groups: int
    layout: TokenLayout
    offered: bool
    reason: str
    live: tuple[bool, ...]
    order: int
    classifier: bool = False
    default: bool = False
    weighted: bool = False
    folded: bool = False


def find_split_layers(model: nn.Module, input_size: tuple[int, int, int]) -> list[SplitLayer]:
    """All nn.Linear and nn.Conv2d layers of `model` in the order they run, each offered or with its reason.

    input_size: (channels, height, width). Costs two forward passes over three random images, and over one a forward and
    a forward and backward pass. ModelError for a model that does not run on such images, returns more than one tensor,
    is compiled, or gives no gradients.
    """
    modules: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError("The model was made in inference mode and gives no gradients; make it outside of that.")
    with borrowed(model), torch.inference_mode(False):
        pictures = Pictures.draw(input_size, next(model.parameters()))
        with _refusing(model, input_size, _NOT_RECORDED):
            graph = record_graph(model, modules, pictures.corners[:1])
            names = [*graph.value, *(name for name in modules if name not in graph.value)]
            verdicts = {name: graph.verdict(name) for name in names}
            candidates = {n: modules[n] for n, verdict in verdicts.items() if verdict.offered}
            seen = observe(model, candidates, pictures)
            layouts = {n: one.layout for n, one in seen.items() if one.refusal is None}
        with _refusing(model, input_size, _NO_GRADIENTS):
            live = live_types(model, {n: (modules[n], found) for n, found in layouts.items()}, pictures)
    return _mark_default(
        [
            _layer(name, modules[name], verdict, seen.get(name), layouts.get(name), live.get(name, ()), position)
            for position, (name, verdict) in enumerate(verdicts.items())
        ]
    )


@contextmanager
def _refusing(model: nn.Module, input_size: tuple[int, int, int], sentence: str) -> Iterator[None]:
    """Anything that a model raises inside the block as a ModelError: what is wrong with its plain forward, or, where
    that works, the sentence with the reason at its {}."""
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        output_size(model, input_size)
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise ModelError(sentence.format(reason)) from error


def choose_layers(layers: list[SplitLayer], names: list[str] | None) -> list[SplitLayer]:
    """The layers named, or the default one; LayerError with the closest names, or with the reason of a refusal."""
    by_name = {layer.name: layer for layer in layers}
    if not names:
        chosen = [layer for layer in layers if layer.default]
        if not chosen:
            offered = ", ".join(layer.name for layer in layers if layer.offered)
            if not offered:
                raise LayerError("No layer of this model can be split; `elude layers MODEL --all` says why.")
            raise LayerError(
                f"This model has no layer that can be split by default; name one with --layers ({offered[:200]})."
            )
        return chosen
    for name in names:
        if name not in by_name:
            hint = did_you_mean(name, by_name) or " `elude layers MODEL` lists them."
            raise LayerError(f"There is no linear layer {name!r} in this model.{hint}")
        if not by_name[name].offered:
            raise LayerError(f"{name} is not offered for splitting: {by_name[name].reason}.")
    return sorted({by_name[n] for n in names}, key=lambda layer: layer.order)


def _layer(
    name: str,
    module: Any,
    verdict: Verdict,
    seen: Seen | None,
    tokens: TokenLayout | None,
    live: tuple[bool, ...],
    order: int,
) -> SplitLayer:
    weight = module.weight
    # a residual branch that starts at zero (fresh weights): nothing can be told, nothing is lost
    types = live if any(live) else (True,) * (tokens.types if tokens else 1)
    return SplitLayer(
        name=name,
        kind="conv" if isinstance(module, nn.Conv2d) else "linear",
        neurons=weight.shape[0],
        inputs=weight.shape[1],
        kernel=tuple(getattr(module, "kernel_size", ())),
        groups=getattr(module, "groups", 1),
        layout=tokens or TokenLayout(1),
        offered=tokens is not None,
        reason=(seen.refusal if seen is not None else None) or verdict.reason,
        live=types,
        order=order,
        classifier=verdict.classifier,
        weighted=verdict.weighted,
        folded=seen is not None and seen.folded,
    )


def _mark_default(layers: list[SplitLayer]) -> list[SplitLayer]:
    """The deepest offered layer, all of whose token types matter, that is not the classifier: where there are any, of
    those that write directly (not by attention weights or a gate), on more than one token, and see an image in one
    piece. Whether a grid was seen does not count: that can depend on the weights."""
    best = [layer for layer in layers if layer.offered and layer.live[0] and not layer.classifier]
    for better in (
        lambda layer: all(layer.live),
        lambda layer: not layer.weighted,
        lambda layer: layer.layout.total > 1,
        lambda layer: not layer.folded,
    ):
        best = list(filter(better, best)) or best
    deepest = max(best, key=lambda layer: layer.order, default=None)
    return [replace(layer, default=layer is deepest) for layer in layers]
