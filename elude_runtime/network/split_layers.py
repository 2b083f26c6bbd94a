"""Finding split layers by rule: every linear layer's output is followed through the network as it really runs.

One forward pass is recorded operation by operation (no module names, no list of architectures). From each linear
layer's output we walk along whatever is linear for it (shapes, LayerScale, an eval-mode BatchNorm, pooling) until it is
added to a stream, enters another linear layer or leaves the network; a norm, a nonlinearity or a gate on the way means
that the sub-units' effects mix before they are read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from elude_runtime.errors import LayerError, ModelError, did_you_mean
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import TokenLayout

# aten operations by what they do to one of their inputs while the others are held fixed
_PASS = frozenset(
    "view _unsafe_view reshape _reshape_alias alias transpose permute t clone contiguous detach expand expand_as "
    "squeeze unsqueeze flatten select slice split split_with_sizes unbind chunk unfold cat stack roll flip index "
    "index_select pixel_shuffle pixel_unshuffle _to_copy to mean sum avg_pool2d _adaptive_avg_pool2d "
    "adaptive_avg_pool2d constant_pad_nd native_dropout dropout as_strided neg lift_fresh copy_ copy im2col "
    "upsample_bilinear2d upsample_nearest2d native_batch_norm _native_batch_norm_legit_no_training "
    "cudnn_batch_norm batch_norm _batch_norm_no_update".split()
)
_ADD = frozenset("add add_ sub sub_ rsub".split())
_MUL = frozenset("mul mul_ div div_".split())
_LINEAR = frozenset("addmm mm linear convolution _convolution mkldnn_linear".split())
_NORM = frozenset("native_layer_norm native_group_norm _fused_rms_norm rsqrt var_mean linalg_vector_norm".split())
_ATTENTION = frozenset("bmm baddbmm matmul _scaled_dot_product_flash_attention_for_cpu _softmax".split())


@dataclass(frozen=True)
class SplitLayer:
    """A linear layer of the network and whether, and why not, it is offered for splitting.

    reason: what follows the layer, or why it is not offered. live: for each token type, whether any of its tokens can
    change the model's output at all. order: position in the forward pass. classifier: its output is the model's.
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


@dataclass
class _Operation:
    name: str
    inputs: list[int]
    outputs: list[int]
    mixes: bool  # more than one input depends on the image


@dataclass
class _Recorder(TorchDispatchMode):
    """Records which value every aten operation read and made. Values are numbered; an in-place result is a new one."""

    operations: list[_Operation] = field(default_factory=list)
    value_of: dict[int, int] = field(default_factory=dict)  # id of a live tensor -> its current value
    keep: list[Tensor] = field(default_factory=list)  # tensors stay alive, so that ids stay unique

    def __post_init__(self) -> None:
        super().__init__()

    def follow(self, tensor: Tensor) -> int:
        self.keep.append(tensor)
        self.value_of[id(tensor)] = value = len(self.keep)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [
            self.value_of[id(t)]
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and id(t) in self.value_of
        ]
        if read:
            made = [self.follow(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
            name = func.overloadpacket.__name__
            self.operations.append(_Operation(name, read, made, len(set(read)) > 1))
        return out


def find_split_layers(model: nn.Module, input_size: tuple[int, int, int]) -> list[SplitLayer]:
    """All nn.Linear and nn.Conv2d layers of `model` in the order they run, each offered or with its reason.

    input_size: (channels, height, width). Costs two forward passes and one backward pass on two random images.
    """
    modules: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        seen, values, out_values, recorder = _record(model, modules, images)
    except Exception as error:  # a model raises anything over an input that it was not built for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"The model does not run on images of size {tuple(input_size)} ({reason}); give its --input-size."
        ) from error
    users: dict[int, list[_Operation]] = defaultdict(list)
    for operation in recorder.operations:
        for value in operation.inputs:
            users[value].append(operation)
    live = _live_tokens(model, {n: modules[n] for n in values}, images)
    layers = []
    for order, name in enumerate(values):
        module, (x, y) = modules[name], seen[name]
        offered, reason, classifier = _judge(values[name], users, set(out_values))
        refusal = _refusal(name, module, x, y, len(images)) if offered else None
        layout = _layout(model, module, y)
        types = tuple(live[name][: layout.types])
        if not any(
            types
        ):  # a residual branch that starts at zero (fresh weights): nothing can be told, nothing is lost
            types = (True,) * layout.types
        layers.append(
            SplitLayer(
                name=name,
                kind="conv" if isinstance(module, nn.Conv2d) else "linear",
                neurons=module.weight.shape[0],
                inputs=module.weight.shape[1],
                kernel=tuple(getattr(module, "kernel_size", ())),
                groups=getattr(module, "groups", 1),
                layout=layout,
                offered=offered and refusal is None,
                reason=refusal or reason,
                live=types,
                order=order,
                classifier=classifier,
            )
        )
    return _mark_default(layers)


def choose_layers(layers: list[SplitLayer], names: list[str] | None) -> list[SplitLayer]:
    """The layers named, or the default one; LayerError with the closest names, or with the reason of a refusal."""
    by_name = {layer.name: layer for layer in layers}
    if not names:
        chosen = [layer for layer in layers if layer.default]
        if not chosen:
            raise LayerError("This model has no layer that can be split by default; name one with --layers.")
        return chosen
    for name in names:
        if name not in by_name:
            hint = did_you_mean(name, by_name) or " `elude layers MODEL` lists them."
            raise LayerError(f"There is no linear layer {name!r} in this model.{hint}")
        if not by_name[name].offered:
            raise LayerError(f"{name} is not offered for splitting: {by_name[name].reason}.")
    return sorted({by_name[n] for n in names}, key=lambda layer: layer.order)


def _record(model: nn.Module, modules: dict[str, Any], images: Tensor) -> tuple[dict, dict, list[int], _Recorder]:
    """One recorded pass: (input and output of every layer that ran once, value of its output, output values)."""
    recorder = _Recorder()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    values: dict[str, int] = {}
    repeated: set[str] = set()
    names = {id(m): n for n, m in modules.items()}

    def note(module: nn.Module, args: tuple, out: Tensor) -> None:
        name = names[id(module)]
        if name in seen:
            repeated.add(name)
        seen[name] = (args[0].detach().clone(), out.detach().clone())
        values[name] = recorder.value_of.get(id(out), -1)

    hooks = [m.register_forward_hook(note) for m in modules.values()]
    try:
        with torch.no_grad(), recorder:
            recorder.follow(images)
            out = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    out_values = [recorder.value_of[id(t)] for t in tree_flatten(out)[0] if id(t) in recorder.value_of]
    for name in repeated:
        values[name] = -2
    return seen, values, out_values, recorder


def _judge(value: int, users: dict[int, list[_Operation]], outputs: set[int]) -> tuple[bool, str, bool]:
    """(offered, reason, is the classifier) for a layer whose output is `value`."""
    if value < 0:
        return False, "it runs more than once in a pass" if value == -2 else "its output is not used as a tensor", False
    pending, visited, ends = [value], {value}, set()
    while pending:
        current = pending.pop()
        if current in outputs:
            ends.add("is the model's output")
        for operation in users[current]:
            verdict, bad = _verdict(operation)
            if bad:
                return False, verdict, False
            if verdict:
                ends.add(verdict)
                continue
            for out in operation.outputs:
                if out not in visited:
                    visited.add(out)
                    pending.append(out)
    if not ends:
        return False, "its output is never used", False
    return True, " and ".join(sorted(ends)), ends == {"is the model's output"}


def _verdict(operation: _Operation) -> tuple[str, bool]:
    """(what the operation means for the layer, whether that ends the case); ("", False) to walk on through it."""
    name = operation.name
    if name in _LINEAR:
        return "passed on to a linear layer", False
    if name in _ADD:
        return ("added to the stream", False) if operation.mixes else ("", False)
    if name in _MUL:
        return ("followed by a gate", True) if operation.mixes else ("", False)
    if name in _PASS:
        return "", False
    if name in _NORM or name == "pow":
        return "followed by a norm", True
    if name in _ATTENTION:
        return "followed by attention", True
    return f"followed by a nonlinearity ({name.strip('_')})", True


def _refusal(name: str, module: Any, x: Tensor, y: Tensor, batch: int) -> str | None:
    """Why a layer cannot be split whatever follows it; None if it can."""
    if getattr(module, "groups", 1) > 1 and module.weight.shape[1] == 1:
        return "depthwise: one edge a neuron, nothing to split"
    if x.shape[0] != batch or y.shape[0] != batch or y.dim() < 2:
        return "its tokens are not laid out image by image"
    try:
        linear = LinearMap(module, name)
        linear.patches(x[:1])
    except LayerError as error:
        return str(error).split("; ")[0]
    # The layer must be linear in its own weight: a standardised or normalised weight is not.
    mask = torch.rand(linear.weight().shape[:2], generator=torch.Generator().manual_seed(1))[..., None] < 0.5
    weight, mask = linear.weight(torch.float64), mask.to(module.weight.device)
    sums = linear.apply(x, weight * mask) + linear.apply(x, weight * ~mask) + linear.bias(torch.float64)
    difference = (sums - linear.tokens(y)).abs().max() / linear.tokens(y).abs().max().clamp(min=1e-30)
    return None if difference < 2e-2 else "its effective weight is computed in its forward pass"


def _layout(model: nn.Module, module: nn.Module, y: Tensor) -> TokenLayout:
    if isinstance(module, nn.Conv2d):
        return TokenLayout(y.shape[2] * y.shape[3], 0, (y.shape[2], y.shape[3]))
    if y.dim() == 2:
        return TokenLayout(1)
    if y.dim() == 4:
        return TokenLayout(y.shape[1] * y.shape[2], 0, (y.shape[1], y.shape[2]))
    total = y[0, ..., 0].numel()
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    prefix = prefix if 0 < prefix < total else 0
    side = round((total - prefix) ** 0.5)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (side, side)
    rows, columns = int(grid[0]), int(grid[1])
    return TokenLayout(total, prefix, (rows, columns) if rows * columns == total - prefix else None)


def _live_tokens(model: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> dict[str, list[bool]]:
    """For every layer, whether position tokens, then prefix tokens, have a gradient that is not exactly zero."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.retain_grad()
                outputs[name] = out

        return hook

    hooks = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    wanted = [p.requires_grad for p in model.parameters()]
    try:
        model.requires_grad_(True)
        with torch.enable_grad():
            leaves = [t for t in tree_flatten(model(images))[0] if isinstance(t, Tensor) and t.requires_grad]
            generator = torch.Generator().manual_seed(2)
            torch.stack([(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in leaves]).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
            parameter.grad = None
    found = {}
    for name, module in modules.items():
        y = outputs.get(name)
        if y is None or y.grad is None:
            found[name] = [False, False]
            continue
        layout = _layout(model, module, y)
        grad = y.grad if isinstance(module, nn.Linear) else y.grad.flatten(2).transpose(1, 2)
        grad = grad.reshape(grad.shape[0], -1, grad.shape[-1]) if grad.shape[0] == len(images) else grad
        found[name] = [bool((grad[:, s] != 0).any()) for s in layout.slices] if grad.dim() == 3 else [True, True]
    return found


def _mark_default(layers: list[SplitLayer]) -> list[SplitLayer]:
    """The deepest offered layer, all of whose token types matter, that is not the classifier."""
    good = [layer for layer in layers if layer.offered and all(layer.live) and not layer.classifier]
    deepest = max(good, key=lambda layer: layer.order, default=None)
    return [replace(layer, default=layer is deepest) for layer in layers]
