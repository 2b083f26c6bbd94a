"""The tail re-run: what the network answers when a split layer's output is something else.

One mechanism for every architecture: in a recorded pass, the modules that finish before the split layer starts keep
their outputs; in a tail they are replayed instead of run, the split layer returns the given output, and everything
after it runs as ever. A model whose glue code does not survive that (found by comparing a null tail with the recorded
pass, bit by bit) gets the same answers from full re-runs in which only the split layer's output is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from elude_runtime.errors import LayerError

REPLAY, FULL = "replay", "full"
_FIXED = -1  # in place of a batch ratio: the output does not depend on the batch size


@dataclass(frozen=True)
class TailPlan:
    """How tails of one layer run. modules: replayed instead of run; ratios: for each module, call and output tensor,
    its leading size over the batch size, or -1 where it is the same for every batch."""

    layer: str
    mode: str
    modules: tuple[str, ...]
    ratios: Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass
class Recording:
    """What one forward pass left behind: images [B, C, H, W], logits [B, K], and for every recorded layer its input x,
    its output y (module layout) and the outputs of the modules that tails replay."""

    images: Tensor
    logits: Tensor
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)


class TailRunner:
    """Records passes of a model and re-runs its tails. The model's modules are patched only inside a call."""

    def __init__(self, model: nn.Module, layers: list[str], input_size: tuple[int, int, int]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.plans = self._plan(layers, input_size)

    def record(self, images: Tensor, layers: list[str]) -> Recording:
        """A forward pass of the untouched model that keeps what explanations and edits of `layers` need.

        Hooks only look: the numbers are those of `model(images)`.
        """
        recording = Recording(images, images)
        wanted = {name for layer in layers for name in self.plans[layer].modules}

        def keep_output(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                recording.outputs.setdefault(name, []).append(out)

            return hook

        def keep_layer(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, out: Tensor) -> None:
                # copies: glue code may change either in place later (`y += x`)
                recording.x[name], recording.y[name] = args[0].clone(), out.clone()

            return hook

        hooks = [self.modules[n].register_forward_hook(keep_output(n)) for n in wanted]
        hooks += [self.modules[n].register_forward_hook(keep_layer(n)) for n in layers]
        try:
            with torch.no_grad():
                recording.logits = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return recording

    def run(
        self,
        recording: Recording,
        layer: str,
        y: Tensor,
        rows: Tensor,
        later: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The model's output [R, K] with `layer` returning y [R, ...] for the images `rows` int64 [R].

        later: for split layers further on, (input, output) -> replaced output, called as they run. Differentiable
        with respect to y where gradients are enabled.
        """
        plan = self.plans[layer]
        replaced: dict[str, Callable[..., Any]] = {layer: lambda *_, **__: y}
        for name in plan.modules:
            replaced[name] = _replay(recording.outputs[name], plan.ratios[name], rows, len(recording.images))
        hooks = []
        for name, change in (later or {}).items():
            hooks.append(self.modules[name].register_forward_hook(lambda _, a, out, change=change: change(a[0], out)))
        try:
            with _forwards({self.modules[n]: f for n, f in replaced.items()}):
                return self.model(recording.images.index_select(0, rows))
        finally:
            for hook in hooks:
                hook.remove()

    def _plan(self, layers: list[str], input_size: tuple[int, int, int]) -> dict[str, TailPlan]:
        parameter = next(self.model.parameters())
        generator = torch.Generator().manual_seed(0)
        traces, passes = {}, {}
        for batch in (2, 3):
            images = torch.randn(batch, *input_size, generator=generator).to(parameter.device, parameter.dtype)
            traces[batch], passes[batch] = self._trace(images), images
        plans = {}
        for layer in layers:
            done = _finished_before(traces[2], layer)
            ratios = {name: _ratios(traces[2].shapes[name], traces[3].shapes[name]) for name in done}
            modules = tuple(n for n in done if ratios[n] is not None)
            plans[layer] = TailPlan(layer, REPLAY, modules, {n: r for n, r in ratios.items() if r is not None})
        self.plans = plans
        for layer in layers:
            if self._null_tail_holds(layer, passes[3]):
                continue
            plans[layer] = TailPlan(layer, FULL, (), {})
            if not self._null_tail_holds(layer, passes[3]):
                raise LayerError(f"{layer} cannot be split: giving it its own output again changes the model's.")
        return plans

    def _null_tail_holds(self, layer: str, images: Tensor) -> bool:
        recording = self.record(images, [layer])
        y = recording.y[layer].clone()
        try:
            with torch.no_grad():
                again = self.run(recording, layer, y, torch.arange(len(images), device=images.device))
        except (RuntimeError, TypeError, AttributeError, IndexError):
            return False  # glue code that cannot take replayed outputs; a full re-run asks nothing of it
        return torch.equal(again.nan_to_num(), recording.logits.nan_to_num())  # broken weights are not the tail's fault

    def _trace(self, images: Tensor) -> _Trace:
        trace = _Trace()
        hooks = []
        for name, module in self.modules.items():
            if not name:
                continue
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: trace.events.append((name, True))))

            def leave(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                trace.events.append((name, False))
                shapes = [t.shape if isinstance(t, Tensor) else None for t in tree_flatten(out)[0]]
                trace.shapes.setdefault(name, []).append(shapes)

            hooks.append(module.register_forward_hook(leave))
        try:
            with torch.no_grad():
                self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return trace


@dataclass
class _Trace:
    events: list[tuple[str, bool]] = field(default_factory=list)  # (module, entered or left) in order
    shapes: dict[str, list[list[torch.Size | None]]] = field(default_factory=dict)  # module -> call -> tensors


def _finished_before(trace: _Trace, layer: str) -> list[str]:
    """The outermost modules whose every call has finished when `layer` starts."""
    start = trace.events.index((layer, True))
    before = {name for name, entered in trace.events[:start] if not entered}
    after = {name for name, _ in trace.events[start:]}
    done = before - after
    return sorted(n for n in done if not any(n.startswith(other + ".") for other in done))


def _ratios(two: list, three: list) -> tuple[tuple[int, ...], ...] | None:
    """Leading size over batch size of every output tensor, from passes with batches of 2 and 3; None: unclear."""
    if len(two) != len(three):
        return None
    calls = []
    for a, b in zip(two, three, strict=True):
        ratios = []
        for small, large in zip(a, b, strict=True):
            if small is None or small == large:
                ratios.append(_FIXED)
            elif small[1:] == large[1:] and small[0] % 2 == 0 and small[0] * 3 == large[0] * 2:
                ratios.append(small[0] // 2)
            else:
                return None
        calls.append(tuple(ratios))
    return tuple(calls)


def _replay(calls: list[Any], ratios: tuple[tuple[int, ...], ...], rows: Tensor, batch: int) -> Callable[..., Any]:
    """A forward that returns the recorded outputs, call by call, for the chosen rows.

    Always a copy: glue code may add in place, and tensors of inference mode cannot enter a graph.
    """
    remaining = iter(zip(calls, ratios, strict=True))

    def pick(tensor: Any, ratio: int) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if ratio == _FIXED:
            return tensor.clone()
        if ratio == 1:
            return tensor.index_select(0, rows)
        return tensor.unflatten(0, (batch, ratio)).index_select(0, rows).flatten(0, 1)

    def forward(*_: Any, **__: Any) -> Any:
        out, call_ratios = next(remaining)
        leaves, spec = tree_flatten(out)
        return tree_unflatten([pick(t, r) for t, r in zip(leaves, call_ratios, strict=True)], spec)

    return forward


@contextmanager
def _forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for the length of the block."""
    before = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = earlier
