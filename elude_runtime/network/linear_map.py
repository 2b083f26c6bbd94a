"""One view on every linear layer that can be split: weight `[d, n, q]`, tokens `[B, T, d]`, whatever the module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from elude_runtime.errors import LayerError


class LinearMap:
    """An nn.Linear or nn.Conv2d as tokens and edges.

    d neurons (output channels), n input channels per group, q kernel positions, G groups. A token is a row of a
    linear layer's input or an output position of a convolution (row by row). A layer may see [B, n] (one token),
    [B, T, n] or channels-last [B, H, W, n]. The wrapped module is never changed.
    """

    def __init__(self, module: nn.Module, name: str = "layer") -> None:
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise LayerError(f"{name} pads with {module.padding_mode!r}; only zero padding can be split.")
            self.kernel: tuple[int, ...] = tuple(module.kernel_size)
            self.groups = module.groups
        elif isinstance(module, nn.Linear):
            self.kernel, self.groups = (), 1
        else:
            raise LayerError(f"{name} is a {type(module).__name__}; only nn.Linear and nn.Conv2d can be split.")
        self.module: Any = module
        self.name = name
        self.neurons = module.weight.shape[0]
        self.inputs = module.weight.shape[1]
        self.positions = module.weight[0, 0].numel()

    @property
    def is_conv(self) -> bool:
        return bool(self.kernel)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[d, n, q], detached."""
        return self.module.weight.detach().reshape(self.neurons, self.inputs, self.positions).to(dtype)

    def bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[d]; zeros where the layer has none."""
        if self.module.bias is None:
            return torch.zeros(self.neurons, dtype=dtype, device=self.module.weight.device)
        return self.module.bias.detach().to(dtype)

    def apply(self, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
        """The layer with other weights and no bias, as tokens.

        x in the module's input layout; weight [D, c, q] with c input channels per group; returns [B, T, D] in the
        dtype of `weight`. groups: of `weight`, the module's own by default.
        """
        x = x.to(weight.dtype)
        if not self.is_conv:
            return self.tokens(F.linear(x, weight[..., 0]))
        x, padding = self._padded(x)
        kernel = weight.unflatten(-1, self.kernel)
        conv = self.module
        return self.tokens(F.conv2d(x, kernel, None, conv.stride, padding, conv.dilation, groups or self.groups))

    def tokens(self, y: Tensor) -> Tensor:
        """The module's output layout as [B, T, D]."""
        if self.is_conv:
            return y.flatten(2).transpose(1, 2)
        return y[:, None] if y.dim() == 2 else y.flatten(1, -2)

    def untokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """[R, T, d] back to the layout of `like` (any number of rows)."""
        if self.is_conv:
            return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], *like.shape[2:])
        return tokens.reshape(-1, *like.shape[1:])

    def patches(self, x: Tensor) -> Tensor:
        """What every token reads: [B, T, G, n, q] in float32 (an unfold for kernels larger than one)."""
        x = x.float()
        if not self.is_conv:
            return self.tokens(x)[:, :, None, :, None]
        x, padding = self._padded(x)
        conv = self.module
        if padding == "same":
            raise LayerError(f"{self.name} uses string padding; give the padding in pixels to split it.")
        columns = F.unfold(x, self.kernel, conv.dilation, padding, conv.stride)  # [B, C * q, T]
        return columns.transpose(1, 2).unflatten(-1, (self.groups, self.inputs, self.positions))

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        conv = self.module
        if isinstance(conv, Conv2dSame):
            return pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation)), 0
        return x, conv.padding

    def edge_gradient(self, x: Tensor, gradient: Tensor, token_slices: list[slice]) -> list[Tensor]:
        """sum over a slice of tokens of gradient_k * x_j for every edge and kernel position: [d, n, q] a slice.

        x in the module's layout for ONE image [1, ...]; gradient [1, T, d]. Times the weight and summed over q this is
        the gradient x activation of every edge (design "Attribution"), at the price of one matrix product.
        """
        reads = self.patches(x)[0].to(gradient.dtype)  # [T, G, n, q]
        per_group = gradient[0].unflatten(-1, (self.groups, -1))  # [T, G, d/G]
        return [torch.einsum("tgd,tgnq->gdnq", per_group[s], reads[s]).flatten(0, 1) for s in token_slices]
