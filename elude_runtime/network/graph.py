"""What becomes of a layer's output: one forward pass recorded operation by operation, and walked from the output on.

No module names and no list of architectures: an operation is known by what it does to one of its inputs while the
others are held fixed. From a layer's output we walk along whatever is linear for it (shapes, LayerScale, an eval-mode
BatchNorm, pooling, attention whose weights do not depend on it) until it is added to a stream, enters another linear
layer or leaves the network. A norm, a nonlinearity, or a product with something that depends on the output itself ends
the walk: there the effects of its parts mix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from elude_runtime.errors import ModelError

ADDED, PASSED_ON, OUTPUT = "added to the stream", "passed on to a linear layer", "is the model's output"

# aten operations that are linear in all their tensor inputs together
_JOINT = frozenset(
    "view _unsafe_view reshape _reshape_alias alias transpose permute t clone contiguous detach expand expand_as "
    "squeeze unsqueeze flatten select slice split split_with_sizes unsafe_split unsafe_chunk unbind chunk unfold cat "
    "stack roll flip rot90 repeat tile movedim swapaxes diagonal pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle _to_copy to mean sum nansum cumsum avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d "
    "avg_pool1d adaptive_avg_pool1d constant_pad_nd pad reflection_pad2d replication_pad2d native_dropout dropout "
    "as_strided neg lift_fresh copy_ copy im2col col2im upsample_bilinear2d upsample_nearest2d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d real imag view_as_real "
    "view_as_complex tril triu _fft_r2c _fft_c2r _fft_c2c as_strided_ squeeze_ unsqueeze_ transpose_ t_ detach_".split()
)
_ADD = frozenset("add add_ sub sub_ rsub".split())
_COMBINE = frozenset("lerp lerp_ addcdiv addcdiv_".split())  # sums of the inputs at 0 and 1, weighted by that at 2
# linear in the inputs at these positions; the others choose, divide or scale
_AT: dict[str, tuple[int, ...]] = {
    **dict.fromkeys("index index_select gather masked_select take grid_sampler_2d grid_sampler div div_".split(), (0,)),
    **dict.fromkeys("index_put index_put_ _unsafe_index_put masked_scatter masked_scatter_".split(), (0, 2)),
    **dict.fromkeys(
        "scatter scatter_ scatter_add scatter_add_ index_add index_add_ index_copy index_copy_".split(), (0, 3)
    ),
    **dict.fromkeys("slice_scatter select_scatter masked_fill masked_fill_ fill_".split(), (0, 1)),
    "where": (1, 2),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "miopen_batch_norm batch_norm _batch_norm_no_update".split(),
        (0,),
    ),
}
_SCALE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # as below, element by element
    **dict.fromkeys("mul mul_".split(), ((0, 1), ())),
    **dict.fromkeys("addcmul addcmul_".split(), ((1, 2), (0,))),
}
# products of matrices: the two factors, and what is added to their product
_MATRIX: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **dict.fromkeys("mm bmm matmul mv dot einsum".split(), ((0, 1), ())),
    **dict.fromkeys("linear convolution _convolution mkldnn_linear mkldnn_convolution".split(), ((0, 1), (2,))),
    **dict.fromkeys("cudnn_convolution conv2d conv1d".split(), ((0, 1), (2,))),
    **dict.fromkeys("addmm addmm_ baddbmm baddbmm_ addmv addbmm".split(), ((1, 2), (0,))),
}
_NORM = frozenset(
    "native_layer_norm native_group_norm _fused_rms_norm rms_norm rsqrt var var_mean std std_mean linalg_vector_norm "
    "norm pow sqrt".split()
)
_SOFTMAX = frozenset("_softmax softmax _safe_softmax _log_softmax".split())
_FUSED_ATTENTION = "_scaled_dot_product"  # of queries, keys, values: linear in the values alone
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full "
    "new_empty_strided".split()
)
_PLAIN = {"max_pool2d_with_indices": "max pooling", "amax": "a maximum", "max": "a maximum"}


@dataclass(frozen=True)
class Verdict:
    """offered: the layer's effect stays separable up to the next norm or nonlinearity; reason: what follows it.

    classifier: nothing but the model's output follows. weighted: on its way it is multiplied by attention weights or a
    gate, neither of which depends on it.
    """

    offered: bool
    reason: str
    classifier: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class _Operation:
    name: str
    reads: tuple[tuple[int, int], ...]  # (position of the argument, value)
    makes: tuple[int, ...]
    whole: bool  # it makes nothing but whole numbers or truth values
    training: bool  # of a batch norm: its statistics are those of the batch


class Recorder(TorchDispatchMode):
    """Records which values every aten operation read and made. Values are numbered in the order they come up, and an
    in-place result is a new one. Tensors are not kept alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.values = 0
        self._value: dict[int, tuple[TensorWeakRef, int]] = {}  # by id of the tensor
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}  # by storage: the last value that lies in it
        self._written: dict[int, tuple[StorageWeakRef, int]] = {}  # by storage: the last value written into it

    def follow(self, tensor: Tensor) -> int:
        """Give a tensor a new value."""
        self.values += 1
        self._value[id(tensor)] = (TensorWeakRef(tensor), self.values)
        if tensor.layout == torch.strided:
            storage = StorageWeakRef(tensor.untyped_storage())
            self._made[storage.cdata] = (storage, self.values)
        return self.values

    def values_of(self, tensor: Tensor) -> list[int]:
        """The values a tensor stands for: its own (of a tensor that no operation made, such as `y.data`, the last that
        lies in its storage), and what was written into its storage since through another view."""
        reference, own = self._value.get(id(tensor), (None, 0))
        storage = StorageWeakRef(tensor.untyped_storage()).cdata if tensor.layout == torch.strided else -1
        if reference is None or reference() is not tensor:
            own = self._made.get(storage, (None, 0))[1]
        written = self._written.get(storage, (None, 0))[1]
        return [value for value in (own, written if written > own else 0) if value]

    def value_of(self, tensor: Tensor) -> int | None:
        """The latest value; None for a tensor that does not depend on what is followed."""
        return max(self.values_of(tensor), default=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        position = {a.name: i for i, a in enumerate(arguments)}
        given = [*enumerate(args), *((position[name], value) for name, value in kwargs.items())]
        reads = tuple(
            (i, value)
            for i, argument in given
            for tensor in tree_leaves(argument)
            if isinstance(tensor, Tensor)
            for value in self.values_of(tensor)
        )
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if reads and name not in _SHAPE_ONLY:
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            makes = tuple(self.follow(t) for t in made)
            whole = not any(t.is_floating_point() or t.is_complex() for t in made)
            if func._schema.is_mutable and makes:
                for i, argument in given:
                    info = arguments[i].alias_info
                    if info is not None and info.is_write and isinstance(argument, Tensor):
                        storage = StorageWeakRef(argument.untyped_storage())
                        self._written[storage.cdata] = (storage, makes[-1])
            training = any(arguments[i].name == "training" and bool(a) for i, a in given)
            self.operations.append(_Operation(name, reads, makes, whole, training))
        return out


@dataclass
class Graph:
    """One recorded pass. value: of every module's linear operation (of its output, where it comes to none), by name;
    absent where the module did not run, None where its output does not depend on the images. repeated: modules that ran
    more than once. outputs: the model's own."""

    operations: list[_Operation]
    outputs: set[int]
    value: dict[str, int | None] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    last_use: dict[int, int] = field(default_factory=dict)  # value -> index of the last operation that reads it
    made_by: dict[int, int] = field(default_factory=dict)  # value -> index of the operation that made it

    def verdict(self, name: str) -> Verdict:
        """Whether the effect of a module's output stays separable, and what follows it."""
        if name not in self.value:
            return Verdict(False, "it does not run as a module in the forward pass")
        if name in self.repeated:
            return Verdict(False, "it runs more than once in a pass")
        value = self.value[name]
        if value is None:
            return Verdict(False, "its output does not depend on the image")
        verdict = self._walk(value, through_additions=False)
        if verdict.offered and PASSED_ON not in verdict.reason:
            onward = self._walk(value, through_additions=True)
            return Verdict(True, verdict.reason, onward.offered and onward.reason == OUTPUT, verdict.weighted)
        return verdict

    def _walk(self, value: int, through_additions: bool) -> Verdict:
        linear = {value}  # values that are linear in the output
        depend = {value}  # values that depend on it in any way
        ends: set[str] = set()
        weighted = False
        index, horizon = self.made_by.get(value, -1) + 1, self.last_use.get(value, -1)
        while index <= horizon:
            operation = self.operations[index]
            index += 1
            if not any(v in depend for _, v in operation.reads):
                continue
            depend.update(operation.makes)
            if not any(v in linear for _, v in operation.reads):
                continue
            step = _step(operation, linear, depend)
            if step.refused:
                return Verdict(False, step.refused)
            weighted = weighted or step.weighted
            if step.end and not (through_additions and step.end == ADDED):
                ends.add(step.end)
            else:
                linear.update(operation.makes)
                horizon = max(horizon, *(self.last_use.get(v, -1) for v in operation.makes), -1)
        if linear & self.outputs:
            ends.add(OUTPUT)
        if not ends:
            return Verdict(False, "its output is never used")
        return Verdict(True, " and ".join(sorted(ends)), weighted=weighted)


@dataclass(frozen=True)
class _Step:
    refused: str = ""
    end: str = ""
    weighted: bool = False


def _step(operation: _Operation, linear: set[int], depend: set[int]) -> _Step:
    """What an operation means for a layer some of whose inputs `linear` are linear in the layer's output, and some of
    whose inputs `depend` on it at all."""
    name = operation.name
    plain = name.strip("_")
    dependent = {position for position, v in operation.reads if v in depend}
    if name in _JOINT:
        return _Step(f"followed by rounding to whole numbers ({plain})") if operation.whole else _Step()
    if name in _ADD:
        return _Step() if all(v in linear for _, v in operation.reads) else _Step(end=ADDED)
    if name in _COMBINE:
        if 2 in dependent and (len(dependent) > 1 or name.startswith("addcdiv")):
            return _Step("followed by a gate that depends on it" if "lerp" in name else "divided by what depends on it")
        summands = [v for position, v in operation.reads if position < 2]
        if 2 in dependent:
            return _Step(end=ADDED, weighted=True) if summands else _Step()
        weighted = any(position == 2 for position, _ in operation.reads)
        return _Step(end="" if all(v in linear for v in summands) else ADDED, weighted=weighted)
    if name in _SCALE:
        return _product_step(operation, *_SCALE[name], linear, dependent, "followed by a gate that depends on it")
    if name in _MATRIX:
        mixed = "multiplied by what depends on it" if "conv" in name else "followed by attention"
        step = _product_step(operation, *_MATRIX[name], linear, dependent, mixed)
        return step if step.refused or step.weighted or step.end else _Step(end=PASSED_ON)
    if name.startswith(_FUSED_ATTENTION):
        return _Step(weighted=True) if dependent == {2} else _Step("followed by attention")
    if name in _AT and not operation.training:
        if dependent <= set(_AT[name]):
            return _Step()
        return _Step("divided by what depends on it" if name.startswith("div") else f"it chooses ({name.strip('_')})")
    if name in _NORM or operation.training:
        return _Step("followed by a norm")
    if name in _SOFTMAX:
        return _Step("followed by attention")
    return _Step(f"followed by {_PLAIN.get(name, f'a nonlinearity ({plain})')}")


def _product_step(
    operation: _Operation,
    factors: tuple[int, ...],
    added: tuple[int, ...],
    linear: set[int],
    dependent: set[int],
    mixed: str,
) -> _Step:
    """A product of the inputs at `factors`, and a sum of it and the input at `added`."""
    if dependent >= set(factors):
        return _Step(mixed)
    mine = {position for position, v in operation.reads if v in linear}
    others = {position for position, _ in operation.reads} - mine
    if (mine <= set(added) and others) or others & set(added):
        return _Step(end=ADDED)
    return _Step(weighted=bool(others & set(factors)))


def record_graph(model: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> Graph:
    """The graph of one forward pass on `images`, with the value of every module. ModelError where the model does not
    return one tensor."""
    recorder = Recorder()
    graph = Graph(recorder.operations, set())
    starts: dict[nn.Module, int] = {}
    names = {module: name for name, module in modules.items()}

    def before(module: nn.Module, _: Any) -> None:
        starts[module] = len(recorder.operations)

    def after(module: nn.Module, _: Any, out: Any) -> None:
        name = names[module]
        if name in graph.value:
            graph.repeated.add(name)
        value = recorder.value_of(out) if isinstance(out, Tensor) else None
        if value is not None:  # what a forward of its own does after its linear operation counts as following it
            own = (o for o in recorder.operations[starts[module] :] if o.name in _MATRIX)
            value = next((o.makes[0] for o in own), value)
        graph.value[name] = value

    hooks = [module.register_forward_pre_hook(before) for module in modules.values()]
    hooks += [module.register_forward_hook(after) for module in modules.values()]
    try:
        with torch.no_grad(), recorder:
            recorder.follow(images)
            out = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor):
        raise ModelError(
            f"The model returns a {type(out).__name__} instead of one tensor; give a factory (--model-factory) whose "
            "model returns the logits or the embedding alone."
        )
    graph.outputs.update(recorder.values_of(out))
    for index, operation in enumerate(recorder.operations):
        for _, value in operation.reads:
            graph.last_use[value] = index
        for value in operation.makes:
            graph.made_by[value] = index
    return graph
