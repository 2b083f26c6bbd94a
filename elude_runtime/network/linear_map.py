"""One view on every linear layer that can be split: weight `[d, n, q]`, tokens `[B, T, d]`, whatever the module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elude_runtime.errors import LayerError

Pair = tuple[int, int]


class LinearMap:
    """An nn.Linear or nn.Conv2d (or a subclass of either) as tokens and edges.

    d neurons (output channels), n input channels per group, q kernel positions, G groups. A token is a row of a
    linear layer's input or an output position of a convolution (row by row). A layer may see [B, n] (one token),
    [B, T, n] or more axes of tokens ([B, H, W, n], windows [B, W, T, n]), a convolution also windows [B, W, C, h, w].
    The wrapped module is never changed.

    Weight, bias, stride, padding and groups are those that the module's own forward hands to the linear operation, so
    that a standardised, normalised or otherwise computed weight is the *effective* one, and padding that a forward
    does by itself is done here too. LayerError for a module whose forward comes to no such operation.
    """

    def __init__(self, module: nn.Module, name: str = "layer") -> None:
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise LayerError(f"{name} is a {type(module).__name__}; only nn.Linear and nn.Conv2d can be split.")
        self.module: Any = module
        self.name = name
        with torch.no_grad():
            found = self._reach(self._example(module))
        self._own_weight = isinstance(found.weight, nn.Parameter) and found.weight is module.weight
        self._own_bias = found.bias is None or (isinstance(found.bias, nn.Parameter) and found.bias is module.bias)
        self._cached: tuple[Any, Tensor] | None = None
        self._untouched: set[tuple[int, ...]] = set()  # input sizes that the forward hands on as they are
        self.kernel: tuple[int, ...] = tuple(found.weight.shape[2:])
        self.groups = found.groups
        self.neurons, self.inputs = found.weight.shape[:2]
        self.positions = found.weight[0, 0].numel()
        self.has_bias = found.bias is not None
        self._stride, self._dilation, self._padding = found.stride, found.dilation, found.padding

    @property
    def is_conv(self) -> bool:
        return bool(self.kernel)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's own weight."""
        return self.module.weight.dtype

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[d, n, q], detached. A computed weight is computed in float64 where that is asked for."""
        if self._own_weight and dtype == self.dtype:
            weight = self.module.weight.detach()
        elif dtype == torch.float64:  # exact figures are asked for seldom, and are twice as large: not kept
            weight = self._operation(dtype).weight.to(dtype)
        else:
            state = (dtype, self._state())
            if self._cached is None or self._cached[0] != state:
                self._cached = (state, self._operation(self.dtype).weight.to(dtype))
            weight = self._cached[1]
        return weight.reshape(self.neurons, self.inputs, self.positions)

    def bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[d]; zeros where the layer has none."""
        if not self.has_bias:
            return torch.zeros(self.neurons, dtype=dtype, device=self.module.weight.device)
        if self._own_bias:
            return self.module.bias.detach().to(dtype)
        bias = self._operation(dtype if dtype == torch.float64 else self.dtype).bias
        return bias.to(dtype)  # type: ignore[union-attr]

    def apply(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """The layer with other weights and no bias, as tokens.

        x in the module's input layout; weight [D, c, q] with c input channels per group; returns [B, T, D] in the
        dtype of `weight`. groups: of `weight`, the module's own by default.
        """
        return self.tokens(self.output(x, weight, groups))

    def output(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """As `apply`, in the module's output layout."""
        if self.is_conv and x.dim() == 5:
            return self.output(x.flatten(0, 1), weight, groups).unflatten(0, (len(x), -1))
        x = self._handed_on(x.to(weight.dtype))
        if not self.is_conv:
            return F.linear(x, weight[..., 0])
        kernel = weight.unflatten(-1, self.kernel)
        x, padding = self._padded(x)
        return F.conv2d(x, kernel, None, self._stride, padding, self._dilation, groups or self.groups)

    def output_size(self, x: Tensor) -> Pair:
        """(rows, columns) of a convolution's output."""
        x, padding = self._padded(self._handed_on(x))
        extents = (x.shape[-2:], padding, self._dilation, self.kernel, self._stride)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(*extents, strict=True))
        return rows, columns

    def tokens(self, y: Tensor) -> Tensor:
        """The module's output layout as [B, T, D]."""
        y = y.movedim(-3, -1) if self.is_conv else y
        return y[:, None] if y.dim() == 2 else y.flatten(1, -2)

    def untokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """[R, T, d] back to the layout of `like` (any number of rows)."""
        if self.is_conv:
            return tokens.unflatten(1, (*like.shape[1:-3], *like.shape[-2:])).movedim(-1, -3)
        return tokens.reshape(-1, *like.shape[1:])

    def patches(self, x: Tensor) -> Tensor:
        """What every token reads: [B, T, G, n, q] in float32 (an unfold for kernels larger than one)."""
        if self.is_conv and x.dim() == 5:
            return self.patches(x.flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1, 2)
        x = self._handed_on(x.float())
        if not self.is_conv:
            return self.tokens(x)[:, :, None, :, None]
        x, padding = self._padded(x)
        columns = F.unfold(x, self.kernel, self._dilation, padding, self._stride)  # [B, C * q, T]
        return columns.transpose(1, 2).unflatten(-1, (self.groups, self.inputs, self.positions))

    def edge_gradient(self, x: Tensor, gradient: Tensor, token_slices: list[slice]) -> list[Tensor]:
        """sum over a slice of tokens of gradient_k * x_j for every edge and kernel position: [d, n, q] a slice.

        x in the module's layout for ONE image [1, ...]; gradient [1, T, d]. Times the weight and summed over q this is
        the gradient x activation of every edge (design "Attribution"), at the price of one matrix product.
        """
        reads = self.patches(x)[0].to(gradient.dtype)  # [T, G, n, q]
        per_group = gradient[0].unflatten(-1, (self.groups, -1))  # [T, G, d/G]
        left, right = per_group.permute(1, 2, 0), reads.flatten(2).transpose(0, 1)  # [G, d/G, T], [G, T, n q]
        if self.groups == 1:  # a product of two matrices takes half the time of a batch of one
            left, right = left[0], right[0]
        return [(left[..., s] @ right[..., s, :]).reshape(-1, *reads.shape[2:]) for s in token_slices]

    def _handed_on(self, x: Tensor) -> Tensor:
        """What the module's forward makes of its input before the linear operation: itself, or a padded copy."""
        size = tuple(x.shape[2:]) if self.is_conv else ()
        if size in self._untouched:
            return x
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            found = self._reach(x)
        if found.input is x:
            self._untouched.add(size)
        return found.input

    def _padded(self, x: Tensor) -> tuple[Tensor, Pair]:
        """The input of a convolution and its symmetric zero padding, for `padding="same"` the input padded."""
        if self._padding == "valid":
            return x, (0, 0)
        if self._padding != "same":
            return x, _pair(self._padding)
        both = [d * (k - 1) for d, k in zip(self._dilation, self.kernel, strict=True)]
        rows, columns = [(total // 2, total - total // 2) for total in both]
        return F.pad(x, (*columns, *rows)), (0, 0)

    def _operation(self, dtype: torch.dtype) -> _Operation:
        """The linear operation of the module, or of a copy of it in another dtype."""
        module = self.module
        if self._own_weight and self._own_bias:
            return _Operation(module.weight, module.weight.detach(), module.bias)
        with torch.inference_mode(False), torch.no_grad():
            if dtype != self.dtype:
                module = copy.deepcopy(module).to(dtype)
            return self._reach(self._example(module), module)

    def _state(self) -> tuple[Any, ...]:
        """Changes whenever the module's parameters do."""
        parts = [*self.module.parameters(), *self.module.buffers()]
        return tuple((p.device, p.data_ptr(), 0 if p.is_inference() else p._version) for p in parts)

    def _reach(self, x: Tensor, module: nn.Module | None = None) -> _Operation:
        """Run the module's forward on x up to its linear operation."""
        try:
            with _Stop():
                (module or self.module)(x)
        except _Reached as reached:
            return reached.operation
        raise LayerError(f"{self.name} cannot be split: its forward does not come to one linear operation of its own.")

    @staticmethod
    def _example(module: Any) -> Tensor:
        """A small input that the module takes."""
        weight = module.weight
        if isinstance(module, nn.Linear):
            return weight.new_zeros(1, module.in_features)
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return weight.new_zeros(1, module.in_channels, *(2 * r for r in reach))


@dataclass(frozen=True)
class _Operation:
    """A call of F.linear or F.conv2d."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


class _Reached(Exception):
    def __init__(self, operation: _Operation) -> None:
        super().__init__()
        self.operation = operation


class _Stop(TorchFunctionMode):
    """Ends a forward at its first F.linear or F.conv2d, and says what was handed to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func is F.conv2d:
            found = _Operation(*args, **(kwargs or {}))
            raise _Reached(
                _Operation(
                    found.input, found.weight, found.bias, _pair(found.stride), found.padding, _pair(found.dilation),
                    found.groups,
                )
            )  # fmt: skip
        return func(*args, **(kwargs or {}))


def _pair(value: Any) -> Pair:
    """A size of a convolution as (rows, columns)."""
    if isinstance(value, int):
        return value, value
    rows, columns = (value[0], value[0]) if len(value) == 1 else value
    return int(rows), int(columns)
