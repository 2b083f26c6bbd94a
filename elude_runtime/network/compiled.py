"""A network's forward pass by `torch.compile`, for predictions only: passes that are recorded run module by module."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from elude_runtime.errors import SettingsError

logger = logging.getLogger(__name__)
# More than this relative difference to the plain pass is no rounding: in full precision, and in a shorter type.
_CLOSE, _CLOSE_COARSE = 1e-3, 0.1
_SIZES = (1, 2, 3, 8)  # torch makes one program for a single image, another for any number; most requests are these


class CompiledNetwork:
    """The compiled forward pass of a model in eval mode, which itself stays as it is. Its outputs differ from the
    model's in the last digits; on a CPU they are those of the base model, put through this class, on the same batch.

    difference: the largest one that was seen to the plain pass, over the largest output.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], *, coarse: bool = False) -> None:
        """Compiles, which takes minutes on a CPU, and compares with the plain pass on random images [B, *input_size].
        coarse: passes run in a shorter type than the weights' (autocast, TF32). SettingsError where the model cannot be
        compiled here, or answers otherwise then."""
        if not hasattr(torch.compiler, "set_stance"):
            raise SettingsError(f"`compile` needs torch 2.6 or later, this is {torch.__version__}; leave it out.")
        logger.info("Compiling the network; this takes minutes on a CPU.")
        self._model, self._told = model, False
        parameter = next(model.parameters())
        coarse = coarse or parameter.dtype.itemsize < 4
        generator = torch.Generator().manual_seed(0)
        batches = [
            torch.randn(count, *input_size, generator=generator).to(parameter.device, parameter.dtype)
            for count in _SIZES
        ]
        try:
            self._compile(batches)
            compiled = [self.run(images) for images in batches]
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise SettingsError(
                f"torch.compile cannot compile this model here ({reason}); it needs a C++ compiler, on a GPU Triton "
                "too. Leave `compile` out."
            ) from error
        self.difference = max(self._apart(images, outputs) for images, outputs in zip(batches, compiled, strict=True))
        if not self.difference <= (_CLOSE_COARSE if coarse else _CLOSE):
            raise SettingsError(
                f"The compiled model answers otherwise than the model (a relative difference of {self.difference:.1e} "
                "on random images); leave `compile` out."
            )
        logger.info("The network is compiled; its outputs differ by %.1e of the largest.", self.difference)

    def _compile(self, batches: list[Tensor]) -> None:
        import torch._inductor.config as inductor

        switches = [name for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE") if os.environ.get(name) == "1"]
        if switches:  # torch would hand back the model as it is
            raise RuntimeError(f"it is switched off, by {switches[0]}")
        self._run = torch.compile(self._model, dynamic=True)
        # no processes of the compiler's own, which would stay for as long as the worker does
        with inductor.patch(compile_threads=1), torch.inference_mode():
            for images in batches:
                self._run(images)

    def _apart(self, images: Tensor, compiled: Tensor) -> float:
        with torch.inference_mode():
            plain = self._model(images)
        apart = float((compiled - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
        return apart if apart == apart else float("inf")

    def run(self, images: Tensor) -> Tensor:
        """Outputs of [B, C, H, W] by a program that is there. RuntimeError of torch's own where there is none for this
        batch, as where something is wrong with the batch itself."""
        with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
            return self._run(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs of [B, C, H, W]. A batch without a program runs uncompiled, so that no request waits for a compiler;
        the log says so once."""
        try:
            return self.run(images)
        except RuntimeError as error:
            with torch.inference_mode():
                outputs = self._model(images)  # raises what is wrong with the batch itself
            if not self._told:
                self._told = True
                logger.warning("no compiled program for a batch of %s: it runs uncompiled (%s)", images.shape, error)
            return outputs
