"""Which modules a tail can replay, and how the rows of their outputs belong to images: from three passes that look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

FIXED = -1  # in place of a number of rows: the tensor is the same whatever the images are
REPLAY, FULL = "replay", "full"
_SAMPLED = 1024  # elements of a row that are compared
Hook = Callable[..., Any]


@dataclass(frozen=True)
class OutputRows:
    """A tensor that a module puts out. rows: how many of its leading entries belong to one image, or `FIXED`."""

    rows: int
    shape: torch.Size  # for any number of images; the leading size is only right where it is fixed
    dtype: torch.dtype

    def blank(self, images: int, device: torch.device) -> Tensor:
        """A tensor of this shape that nobody reads: one number, expanded."""
        leading = self.shape[:1] if self.rows == FIXED else (images * self.rows,)
        return torch.zeros((), dtype=self.dtype, device=device).expand((*leading, *self.shape[1:]))

    def choose(self, tensor: Tensor, chosen: Tensor) -> Tensor:
        """The rows of the chosen images, int64 [R], of a recorded output. Always a copy: glue code may
        add in place, and tensors of inference mode cannot enter a graph."""
        if self.rows == FIXED:
            return tensor.clone()
        if self.rows > 1:
            chosen = (chosen[:, None] * self.rows + torch.arange(self.rows, device=chosen.device)).flatten()
        return in_order_of(tensor, tensor.index_select(0, chosen))


def in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with its elements in memory in the order of another one of as many axes (channels-last, say): the same
    values in another order can make an operation round differently."""
    strides = like.stride()
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    if order == sorted(order) or 0 in strides:
        return tensor.contiguous()
    back = [order.index(axis) for axis in range(like.dim())]
    return tensor.permute(order).contiguous().permute(back)


@dataclass(frozen=True)
class CallOutput:
    """What one call of a module returns: its structure, and at each leaf the rows of a tensor, or the constant that
    stands there. number: which of the module's calls in a pass it is."""

    number: int
    structure: TreeSpec
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class TailPlan:
    """How tails of one layer run.

    calls: for every module that is replayed instead of run, what its calls return, those left out that other replayed
    modules would have made. read: of these modules, those whose
    outputs anything that still runs reads; only they are recorded. copied: of those, the ones whose outputs are changed
    in place later on. images: whether anything that still runs reads the images. in_place: whether the layer's own
    input or output is changed in place later on.
    """

    layer: str
    mode: str
    calls: Mapping[str, tuple[CallOutput, ...]] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    copied: frozenset[str] = frozenset()
    images: bool = True
    in_place: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are replayed."""
        return tuple(self.calls)


def draft_plans(model: nn.Module, layers: list[str], images: Tensor, exchanged: Tensor) -> dict[str, TailPlan]:
    """A plan for each layer that replays every module that can be: it has finished when the layer starts, and which
    image a row of its output belongs to is plain.

    images [2, C, H, W]; exchanged: another one [C, H, W] in place of the second. Costs a pass over one image and two
    over two.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    events, of_one = _trace(model, modules, images[:1])
    callers = _callers(events)
    finished = {layer: _finished_before(events, layer, callers) for layer in layers}
    wanted = {name: modules[name] for names in finished.values() for name in names}
    outputs: dict[str, list[Any]] = {}
    versions: dict[str, list[list[int]]] = {}
    before: dict[str, list[_Leaves]] = {}
    after: dict[str, list[_Leaves]] = {}

    def first(name: str, out: Any) -> None:
        outputs.setdefault(name, []).append(out)
        versions.setdefault(name, []).append(_versions(out))
        before.setdefault(name, []).append(_Leaves(out))

    def second(name: str, out: Any) -> None:
        after.setdefault(name, []).append(_Leaves(out))

    own_tensors: dict[str, list[tuple[Any, list[int]]]] = {layer: [] for layer in layers}

    def own(layer: str) -> Hook:
        return lambda _, args, out: own_tensors[layer].append(((args, out), _versions((args, out))))

    handles = [modules[layer].register_forward_hook(own(layer)) for layer in layers]
    try:
        with _watching(wanted, first):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    in_place = {layer: any(_versions(kept) != before for kept, before in own_tensors[layer]) for layer in layers}
    own_tensors.clear()
    changed = {name for name, calls in outputs.items() if [_versions(out) for out in calls] != versions[name]}
    outputs.clear()
    with _watching(wanted, second):
        model(torch.stack([images[0], exchanged]))
    calls = {}
    for name in wanted:
        found = _calls(of_one[name], before.get(name, []), after.get(name, []))
        if found is not None:
            calls[name] = found
    plans = {}
    for layer in layers:
        replayed = {name for name in finished[layer] if name in calls}
        replays = {
            name: tuple(call for call in calls[name] if not callers[name][call.number] & replayed)
            for name in sorted(replayed)
        }
        plans[layer] = TailPlan(
            layer,
            REPLAY if replays else FULL,
            replays,
            frozenset(replays),
            frozenset(replays) & changed,
            in_place=in_place[layer],
        )
    return plans


class _Leaves:
    """The leaves of a module's output, tensors as their shape and some of every row's elements."""

    def __init__(self, out: Any) -> None:
        leaves, self.structure = tree_flatten(out)
        self.values = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [(t.shape, t.dtype) if isinstance(t, Tensor) else None for t in leaves]
        self.samples = [_sample(t) if isinstance(t, Tensor) else None for t in leaves]


def _trace(
    model: nn.Module, modules: dict[str, nn.Module], images: Tensor
) -> tuple[list[tuple[str, bool]], dict[str, list[list[Any]]]]:
    """(module, entered or left) in order; and per module and call the shape of each tensor, or the constant."""
    events: list[tuple[str, bool]] = []
    shapes: dict[str, list[list[Any]]] = {}

    def left(name: str, out: Any) -> None:
        events.append((name, False))
        shapes.setdefault(name, []).append([t.shape if isinstance(t, Tensor) else t for t in tree_leaves(out)])

    def entered(name: str) -> Hook:
        return lambda *_: events.append((name, True))

    handles = [module.register_forward_pre_hook(entered(name)) for name, module in modules.items()]
    try:
        with _watching(modules, left):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return events, shapes


def _callers(events: list[tuple[str, bool]]) -> dict[str, list[set[str]]]:
    """Per module and call, the modules in whose forward it is called, however deep: not told by names, since a module
    may be shared."""
    found: dict[str, list[set[str]]] = {}
    running: list[str] = []
    for name, entered in events:
        if entered:
            found.setdefault(name, []).append(set(running))
            running.append(name)
        else:
            running.pop()
    return found


def _finished_before(events: list[tuple[str, bool]], layer: str, callers: dict[str, list[set[str]]]) -> list[str]:
    """The outermost modules whose every call has finished when `layer` starts."""
    start = events.index((layer, True))
    done = {name for name, entered in events[:start] if not entered} - {name for name, _ in events[start:]}
    return sorted(name for name in done if not all(above & done for above in callers[name]))


def _calls(of_one: list[list[Any]], before: list[_Leaves], after: list[_Leaves]) -> tuple[CallOutput, ...] | None:
    """What the calls of a module return, from passes over one image, over two, and over two with the second exchanged;
    None where it is not plain which rows belong to which image."""
    if not len(of_one) == len(before) == len(after):
        return None
    calls = []
    for number, (single, two, other) in enumerate(zip(of_one, before, after, strict=True)):
        if not len(single) == len(two.values) == len(other.values):
            return None
        leaves: list[Any] = []
        for one, value, value_after, tensor, sample, exchanged in zip(
            single, two.values, other.values, two.tensors, two.samples, other.samples, strict=True
        ):
            if tensor is None or sample is None or exchanged is None:
                if not _same(one, value) or not _same(value, value_after):
                    return None
                leaves.append(value)
                continue
            rows = _rows(tensor[0], one, sample, exchanged)
            if rows is None:
                return None
            leaves.append(OutputRows(rows, *tensor))
        calls.append(CallOutput(number, two.structure, tuple(leaves)))
    return tuple(calls)


def _same(one: Any, other: Any) -> bool:
    """Whether two leaves that are no tensors are the same constant. What does not say so plainly (an array, a dataclass
    of tensors) is none."""
    try:
        return type(one) is type(other) and (one == other) is True
    except Exception:  # a user's object raises anything
        return False


def _rows(two: torch.Size, one: Any, sample: Tensor, exchanged: Tensor) -> int | None:
    """How many leading entries belong to one image: with another second image, only the second half may change."""
    if sample.shape != exchanged.shape or not isinstance(one, torch.Size):
        return None
    changed = (sample != exchanged).any(1)
    if two == one:
        return None if bool(changed.any()) else FIXED
    rows = two[0] // 2
    if not two or not one or two[0] != 2 * rows or one[0] != rows or two[1:] != one[1:]:
        return None
    return None if bool(changed[:rows].any()) else rows


def _sample(tensor: Tensor) -> Tensor:
    """Some elements of every row, [R, ≤ 1024] or a few more."""
    flat = tensor.detach().reshape(len(tensor) if tensor.dim() else 1, -1)
    flat = flat[:, :: max(1, flat.shape[1] // _SAMPLED)]
    return flat.nan_to_num() if flat.is_floating_point() else flat.clone()


def _versions(out: Any) -> list[int]:
    """Counters that rise when a tensor is changed in place."""
    return [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in tree_leaves(out)]


@contextmanager
def _watching(modules: Mapping[str, nn.Module], look: Callable[[str, Any], None]) -> Iterator[None]:
    """Show every module's output to `look` as it is returned."""

    def hook(name: str) -> Hook:
        return lambda _, __, out: look(name, out)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
