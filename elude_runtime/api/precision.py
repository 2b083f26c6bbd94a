"""The precision that a server computes in: said by the configuration, the same for every pass, shown by `describe`.

Predictions are the base model's, bit for bit, where the base model runs under the same policy on the same batch. What
is computed beside the network (sub-unit sums, edits, attributions' sums) is in float32 under every policy.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from elude_runtime.errors import SettingsError

if TYPE_CHECKING:
    from elude_runtime.api.config import Autocast

logger = logging.getLogger(__name__)


def set_tf32(allowed: bool) -> None:
    """TF32 in matrix products and convolutions of this process, both or neither; only GPUs have it. PyTorch's own
    default is one without the other, and TorchServe's base handler turns the other on."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if after != before:
        logger.info("TF32 is %s in this process (matrix products and convolutions).", "on" if allowed else "off")


def run_under_autocast(model: nn.Module, dtype: Autocast | None) -> None:
    """Every forward pass of the model, tails and recorded ones too, runs under autocast to `dtype`; None: as it is.

    The model's class becomes a subclass of it, so that a copy of the model does the same. SettingsError for a model
    whose weights are not float32: its own type is the policy then.
    """
    if dtype is None:
        return
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if types != {torch.float32}:
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise SettingsError(f"autocast takes a model in float32, this one is in {found}; leave `autocast` out.")
    kind = type(model)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        with torch.autocast(next(self.parameters()).device.type, getattr(torch, dtype)):
            return kind.forward(self, *args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    logger.info("Forward passes run under autocast to %s.", dtype)
