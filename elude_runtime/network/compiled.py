"""A network's forward pass by `torch.compile`, for predictions only: passes that are recorded run module by module."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from elude_runtime.errors import SettingsError

logger = logging.getLogger(__name__)
# The compiled pass may differ from the plain one by its type's digits; more than this is another network.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
_CLOSE_HALF = 0.1
_WARM = (1, 2, 3)  # a program for one image, another for any number; the last batch shows that there is no third


class CompiledNetwork:
    """The compiled forward pass of a model in eval mode, which itself stays as it is. Its outputs differ from the
    model's in the last digits; they are those of the base model compiled in the same way on the same batch.

    difference: the largest one that was seen to the plain pass, over the largest output.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        """Compiles, which takes minutes on a CPU, and compares with the plain pass on random images [B, *input_size].
        SettingsError where the model cannot be compiled here, or answers otherwise then."""
        if not hasattr(torch.compiler, "set_stance"):
            raise SettingsError(f"`compile` needs torch 2.6 or later, this is {torch.__version__}; leave it out.")
        parameter = next(model.parameters())
        # no processes of the compiler's own that stay for as long as the worker does
        torch._inductor.config.compile_threads = 1
        self._run = torch.compile(model, dynamic=True)
        self.difference = 0.0
        generator = torch.Generator().manual_seed(0)
        for count in _WARM:
            images = torch.randn(count, *input_size, generator=generator).to(parameter.device, parameter.dtype)
            with torch.inference_mode():
                plain = model(images)
                try:
                    compiled = self._run(images)
                except Exception as error:
                    reason = " ".join(str(error).split())[:300]
                    raise SettingsError(
                        f"torch.compile cannot compile this model here ({reason}); on a CPU it needs a C++ compiler. "
                        "Leave `compile` out."
                    ) from error
            apart = float((compiled - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
            if not apart <= _CLOSE.get(plain.dtype, _CLOSE_HALF):
                raise SettingsError(
                    f"The compiled model answers otherwise than the model (a relative difference of {apart:.1e} on "
                    f"{count} random image(s)); leave `compile` out."
                )
            self.difference = max(self.difference, apart)
        logger.info("The network is compiled; its outputs differ by %.1e of the largest.", self.difference)

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs of [B, C, H, W]. A batch for which there is no program yet runs uncompiled, so that no request waits
        for a compiler."""
        with torch.inference_mode(), torch.compiler.set_stance("eager_on_recompile"):
            return self._run(images)
