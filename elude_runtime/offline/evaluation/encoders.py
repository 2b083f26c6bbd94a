"""Encoders that judge features: a timm network other than the evaluated one, and plain colours and edges.

An encoder is given the very pixels that the evaluated model sees, so that a place in the image is the same for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elude_runtime.errors import EludeError, ModelError
from elude_runtime.network.build import Factory, load_weights
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.timm_source import timm_model
from elude_runtime.network.weights import read_weights

PIXELS = "pixels"
_SAME_WEIGHTS = 0.5  # of an encoder's numbers, from which it is the evaluated model under another name
_COLOURS, _ANGLES, _CELLS = 4, 8, 14


class EncoderError(EludeError):
    """An encoder that cannot judge: the evaluated model itself, or one without features on a grid."""


class Encoder(Protocol):
    """name: in tables and files; sha256: of what it is made of."""

    name: str
    sha256: str

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """RGB in 0..1 [B, 3, H, W] -> (embeddings of images [B, D], of places [B, D', rows, columns] or None)."""
        ...


class PixelEncoder:
    """Colours and directions of edges, without labels or training: per cell the square root of a joint histogram of
    4 x 4 x 4 colours and of 8 gradient directions weighted by the gradient's size; an image is the mean of its
    cells."""

    name = PIXELS
    sha256 = hashlib.sha256(f"{PIXELS} {_COLOURS} {_ANGLES} {_CELLS}".encode()).hexdigest()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (max(1, min(_CELLS, side // 4)) for side in pixels.shape[-2:])
        cells = rows, columns
        level = (pixels.clamp(0, 1) * _COLOURS).long().clamp(max=_COLOURS - 1)
        colour = (level[:, 0] * _COLOURS + level[:, 1]) * _COLOURS + level[:, 2]
        colours = F.adaptive_avg_pool2d(F.one_hot(colour, _COLOURS**3).movedim(-1, 1).float(), cells)
        grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        angle = torch.atan2(down, across).remainder(torch.pi) / torch.pi * _ANGLES  # a direction has no sign
        bins = F.one_hot(angle[:, 0].long().clamp(max=_ANGLES - 1), _ANGLES).movedim(-1, 1)
        edges = F.adaptive_avg_pool2d(bins * torch.hypot(across, down), cells)
        return _histograms(colours.mean((2, 3)), edges.mean((2, 3))), _histograms(colours, edges)


def _histograms(colours: Tensor, edges: Tensor) -> Tensor:
    """Both with length 1 along axis 1 after the square root (Hellinger), the edges' less where there are hardly any."""
    share = edges / (edges.sum(1, keepdim=True) + 0.02)
    return torch.cat([colours.sqrt(), share.sqrt()], 1)


class TimmEncoder:
    """The features before the classifier of a timm model, pooled for images and on its last grid for places."""

    def __init__(self, name: str, model: nn.Module, config: DataConfig) -> None:
        self.name, self.config = name, config
        self.model: Any = model.eval().requires_grad_(False)
        self.hashes = _tensor_hashes(model)
        self.sha256 = hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()
        if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
            raise EncoderError(
                f"The encoder {name} has no forward_features and forward_head as timm's models do; give a timm model."
            )

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.config.input_size[1:]
        if tuple(pixels.shape[-2:]) != tuple(size):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        parameter = next(self.model.parameters())
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        with torch.no_grad():
            features = self.model.forward_features(((pixels - mean) / std).to(parameter.device, parameter.dtype))
            pooled = self.model.forward_head(features, pre_logits=True)
        if not isinstance(features, Tensor) or not isinstance(pooled, Tensor):
            raise EncoderError(f"The encoder {self.name} does not give its features as one tensor; take another.")
        grid = self._grid(features)
        return pooled.flatten(1).float().cpu(), None if grid is None else grid.float().cpu()

    def _grid(self, features: Tensor) -> Tensor | None:
        """[B, D, rows, columns]."""
        if features.dim() == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC" or (
                features.shape[-1] == getattr(self.model, "num_features", 0) != features.shape[1]
            )
            return features.movedim(-1, 1) if last else features
        if features.dim() != 3:
            return None
        patches = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        shape = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        side = round(patches.shape[1] ** 0.5)
        rows, columns = shape if shape and shape[0] * shape[1] == patches.shape[1] else (side, side)
        return patches.mT.unflatten(2, (rows, columns)) if rows * columns == patches.shape[1] else None


@dataclass(frozen=True)
class EncoderChoice:
    """What a user names: a timm model with its hub weights or a local file, or a factory FILE.py:FUNCTION."""

    name: str | None = None
    weights: Path | None = None
    factory: str | None = None

    def build(self, config: Mapping[str, Any] | None = None) -> Encoder:
        """config: of its preprocessing, what is not as timm says. EludeError for what cannot be built."""
        if self.factory:
            factory = Factory.parse(self.factory)
            model = factory.build({})[0]
            name = self.name or factory.function
            if self.weights:
                load_weights(model, read_weights(self.weights), str(self.weights))
        elif self.name == PIXELS:
            return PixelEncoder()
        elif self.name:
            name = self.name
            model = timm_model(name, pretrained=self.weights is None, weights=self.weights).model
        else:
            raise ModelError("Name an encoder with --encoder, or give --encoder-factory FILE.py:FUNCTION.")
        return TimmEncoder(name, model, DataConfig.of_model(model, **(config or {})))


def refuse_evaluated(encoder: Encoder, base: nn.Module) -> None:
    """EncoderError for an encoder that is the evaluated model, whatever it is called: at least half of its numbers
    stand in tensors of the same content (SHA-256 of shape and bytes). It would find its own features clear."""
    if not isinstance(encoder, TimmEncoder):
        return
    own = _tensor_hashes(base)
    same = sum(size for digest, size in encoder.hashes.items() if digest in own)
    if encoder.hashes and same >= _SAME_WEIGHTS * sum(encoder.hashes.values()):
        raise EncoderError(
            f"The encoder {encoder.name} is the evaluated model itself and would judge by its own features; name "
            "another network."
        )


def _tensor_hashes(model: nn.Module) -> dict[str, int]:
    """{SHA-256 of a tensor's shape and float32 bytes: its size}, of those that are not all one number."""
    found = {}
    for tensor in model.state_dict().values():
        plain = tensor.detach().cpu().float().contiguous()
        if plain.numel() > 1 and bool((plain != plain.flatten()[0]).any()):
            shape = str(tuple(plain.shape)).encode()
            found[hashlib.sha256(shape + plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()] = (
                plain.numel()
            )
    return found
