"""The tail re-run: what the network answers when a split layer's output is something else.

One mechanism for every architecture: in a recorded pass, the modules that finish before the split layer starts keep
their outputs; in a tail they are replayed instead of run, the split layer returns the given output, and everything
after it runs as ever. A plan is tried before it is used: every row of a replayed output must belong to one image
(`network.tail_plan`), and tails of a pass in which the split layers put out something else must be that pass, bit by
bit, and give chosen rows their own outputs. A model whose glue code does not survive that gets the same answers from
full re-runs in which only the split layer's output is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elude_runtime.errors import LayerError
from elude_runtime.network.replay import blank, chosen, replay
from elude_runtime.network.tail_plan import FULL, REPLAY, TailPlan, draft_plans, in_order_of
from elude_runtime.network.tokens import by_image

__all__ = ["FULL", "REPLAY", "Recording", "TailPlan", "TailRunner", "record_layers"]

_CLOSE = {torch.float16: 2e-2, torch.bfloat16: 0.15}  # of the largest output: the same rows in another batch
_BLANKS_KEPT = 64  # (layer, number of rows)
Change = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Recording:
    """What one forward pass left behind: images [B, C, H, W], logits [B, K], and for every recorded layer its input x
    and its output y; of modules that tails replay, the tensors that each call put out.

    x and y are in the layer's own layout, except that windows folded into the batch, [B * W, T, C], stand as
    [B, W, T, C].
    """

    images: Tensor
    logits: Tensor
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[list[Tensor]]] = field(default_factory=dict)


class TailRunner:
    """Records passes of a model and re-runs its tails. The model's modules are patched only inside a call.

    output_size: K. Planning takes a pass over one random image, three over two, and a layer a tail over one and one
    over two.
    LayerError for a layer that cannot be split in this model.
    """

    def __init__(self, model: nn.Module, layers: list[str], input_size: tuple[int, int, int]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self._blanks: dict[tuple[str, int, torch.device], dict[str, list[list[Any]]]] = {}
        # Where there are hooks, PyTorch's encoder layer runs its layers one by one, and not by a path of its own that
        # never calls them: so it does in the recorded pass, and tails follow.
        self._looks_on = any(isinstance(module, nn.TransformerEncoderLayer) for module in self.modules.values())
        parameter = next(model.parameters())
        with torch.inference_mode(False), torch.no_grad():
            noise = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0)).to(parameter)
            self.plans = draft_plans(model, layers, noise[:2], noise[2])
            with self._hooks({layer: lambda _, __, out: _other(out) for layer in layers}):
                recording = self.record(noise[:2], layers)
            self.output_size = int(recording.logits.shape[-1])
            for layer in layers:
                self.plans[layer] = self._tried(self.plans[layer], recording)

    def record(self, images: Tensor, layers: list[str], changes: Mapping[str, Change] | None = None) -> Recording:
        """A forward pass of the untouched model that keeps what explanations and edits of `layers` need.

        Hooks only look: the numbers are those of `model(images)`. changes: split layers of which the output is
        replaced, by (input, output) -> output; the recording is that of the pass that follows from it.
        """
        outputs: dict[str, list[list[Tensor]]] = {}
        plans = [self.plans[layer] for layer in layers]
        copied = {name for plan in plans for name in plan.copied}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
                tensors = [t.clone() for t in tensors] if name in copied else tensors
                outputs.setdefault(name, []).append(tensors)

            return hook

        changing = {name: _changing(change, len(images)) for name, change in (changes or {}).items()}
        # a hook that changes an output comes before those that look at it
        with self._hooks(changing), self._hooks({name: keep(name) for plan in plans for name in plan.read}):
            own = {layer: self.modules[layer] for layer in layers}
            kept = {plan.layer for plan in plans if not plan.in_place}
            recording = record_layers(self.model, images, own, kept)
        return replace(recording, outputs=outputs)

    def run(
        self,
        recording: Recording,
        layer: str,
        y: Tensor,
        rows: Tensor,
        later: Mapping[str, Change] | None = None,
    ) -> Tensor:
        """The model's output [R, K] with `layer` returning y [R, ...] for the images `rows` int64 [R].

        later: for split layers further on, (input, output) -> replaced output, called as they run. Differentiable
        with respect to y where gradients are enabled.
        """
        return self._run(self.plans[layer], recording, y, rows, later or {}, lambda *_: None)

    def _run(
        self,
        plan: TailPlan,
        recording: Recording,
        y: Tensor,
        rows: Tensor,
        later: Mapping[str, Change],
        look: Callable[[str, Tensor], None],
    ) -> Tensor:
        if plan.images:
            images = recording.images.index_select(0, rows)
            look("", images)
        else:  # nobody reads them
            images = recording.images[:1].expand(len(rows), *recording.images.shape[1:])

        def given(x: Tensor, *_: Any, **__: Any) -> Tensor:
            ordered = in_order_of(recording.y[plan.layer], y.clone() if plan.in_place else y)
            return ordered if len(x) == len(y) else ordered.flatten(0, 1)

        whole = len(rows) == len(recording.images) and rows.tolist() == list(range(len(rows)))
        replaced: dict[str, Callable[..., Any]] = {plan.layer: given}
        blanks = self._blank(plan, len(rows), rows.device) if plan.calls else {}
        for name, calls in plan.calls.items():
            if name in plan.read:
                leaves = chosen(calls, recording.outputs[name], rows, shared=whole and name not in plan.copied)
            else:
                leaves = iter(blanks[name])
            replaced[name] = replay(name, calls, leaves, look)
        hooks: dict[str, Callable[..., Any]] = dict.fromkeys(recording.y, _look_on) if self._looks_on else {}
        hooks |= {name: _changing(change, len(images)) for name, change in later.items()}
        with self._hooks(hooks), self._forwards(replaced):
            return self.model(images)

    def _blank(self, plan: TailPlan, images: int, device: torch.device) -> dict[str, list[list[Any]]]:
        """Of every replayed module the leaves of each call's output, without contents where they are tensors. Kept: in
        a short tail making them takes longer than the tail."""
        key = (plan.layer, images, device)
        if key not in self._blanks:
            if len(self._blanks) >= _BLANKS_KEPT:
                self._blanks.pop(next(iter(self._blanks)))
            self._blanks[key] = {
                name: [[blank(leaf, images, device) for leaf in call.leaves] for call in calls]
                for name, calls in plan.calls.items()
            }
        return self._blanks[key]

    def _tried(self, plan: TailPlan, recording: Recording) -> TailPlan:
        """The plan that holds: one that records only what is read, or everything, or a full re-run.

        recording: of two images, every split layer's output changed by `_other`.
        """
        if plan.mode == REPLAY:
            with _Reads() as reads:
                holds = self._holds(plan, recording, [1], reads.watch)
            if holds:
                read, copied = plan.read & reads.found, plan.copied & reads.found
                slim = replace(plan, read=read, copied=copied, images="" in reads.found)
                for tried in (slim, plan):
                    if self._holds(tried, recording, [0, 1]):
                        return tried
        full = TailPlan(plan.layer, FULL, in_place=plan.in_place)
        if not all(self._holds(full, recording, rows) for rows in ([1], [0, 1])):
            raise LayerError(
                f"{plan.layer} cannot be split: given another output of it, the model does not answer as it does where "
                "the layer really puts that out; choose another layer."
            )
        return full

    def _holds(
        self,
        plan: TailPlan,
        recording: Recording,
        chosen: list[int],
        look: Callable[[str, Tensor], None] = lambda *_: None,
    ) -> bool:
        """Whether a tail gives chosen rows their recorded outputs: all of them bit by bit, some but for rounding."""
        rows = torch.tensor(chosen, device=recording.images.device)
        y = recording.y[plan.layer].index_select(0, rows)
        others = {n: lambda _, out: _other(out) for n in recording.y if n != plan.layer and n not in plan.calls}
        try:
            found = self._run(plan, recording, y, rows, others, look)
        except Exception:  # glue code that cannot take replayed outputs; a full re-run asks nothing of it
            return False
        # broken weights are not the tail's fault
        found, expected = found.nan_to_num(), recording.logits.index_select(0, rows).nan_to_num()
        if found.shape != expected.shape or len(rows) == len(recording.images):
            return torch.equal(found, expected)
        bound = _CLOSE.get(found.dtype, 1e-2) * float(expected.abs().max())
        return float((found - expected).abs().max()) <= bound

    def _hooks(self, hooks: Mapping[str, Any]) -> AbstractContextManager[None]:
        return _hooks([(self.modules[name], hook) for name, hook in hooks.items()])

    @contextmanager
    def _forwards(self, replaced: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Give modules another forward for the length of the block."""
        modules = {name: self.modules[name] for name in replaced}
        before = {name: module.__dict__.get("forward") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.__dict__["forward"] = replaced[name]
            yield
        finally:
            for name, module in modules.items():
                earlier = before[name]
                if earlier is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = earlier


def record_layers(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Module], untouched: Set[str] = frozenset()
) -> Recording:
    """A forward pass of the untouched model that keeps input and output of some of its layers, and no more: enough to
    look at features, not for tails. untouched: layers of which neither is changed in place later on; of others copies
    are kept."""
    recording = Recording(images, images)

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            x, y = (args[0], out) if name in untouched else (args[0].clone(), out.clone())
            recording.x[name], recording.y[name] = by_image(x, len(images)), by_image(y, len(images))

        return hook

    with torch.no_grad(), _hooks([(module, keep(name)) for name, module in layers.items()]):
        recording.logits = model(images)
    return recording


@contextmanager
def _hooks(hooks: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks for the length of the block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changing(change: Change, images: int) -> Callable[..., Tensor]:
    """A hook that replaces a layer's output."""

    def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        with torch.autocast(out.device.type, enabled=False):  # the network may run under autocast, edits never do
            return change(by_image(args[0], images), by_image(out, images)).reshape(out.shape)

    return hook


def _other(y: Tensor) -> Tensor:
    """Another output than y, of the same size and order in memory: what is positive halved, so that nothing grows and
    no normalisation undoes it; ones in place of zeros."""
    return torch.where(y == 0, 1, torch.where(y > 0, y / 2, y))


def _look_on(*_: Any) -> None:
    """A hook that changes nothing."""


class _Reads(TorchDispatchMode):
    """Finds out whose replayed outputs any operation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._watched: dict[int, tuple[str, Tensor]] = {}  # by id; the tensor, so that ids stay unique

    def watch(self, name: str, tensor: Tensor) -> None:
        self._watched[id(tensor)] = (name, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._watched:
                self.found.add(self._watched[id(leaf)][0])
        return func(*args, **(kwargs or {}))
