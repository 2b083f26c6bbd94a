"""What a model must be like to be looked into, and the state it is in meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.errors import ModelError, SettingsError


def output_size(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """K of the model's output [B, K] for images of that size. ModelError for a model that does not run on them, that
    returns anything else (a tuple, a dictionary, unpooled tokens), or that answers otherwise when it is looked at."""
    first = next(model.parameters())
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(first)
    try:
        with borrowed(model), torch.no_grad():
            out = model(images)
            hooks_matter = not _same_with_hooks(model, images, out)
    except ModelError:
        raise
    except Exception as error:  # a model raises anything over an input that it was not built for
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), input_size[0])
        if channels != input_size[0] and "channels" in str(error):
            raise ModelError(
                f"The model takes images of {channels} channels; it must take colour images, of 3."
            ) from error
        types = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        advice = "give its --input-size" if len(types) == 1 else f"it mixes {' and '.join(types)}: save it in one type"
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise ModelError(
            f"The model does not run on images of size {tuple(input_size)} ({reason}); {advice}."
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ModelError(
            f"The model returns {got} for two images, not logits or an embedding [2, K]; give a --model-factory that "
            "returns one tensor."
        )
    if hooks_matter:
        raise ModelError(
            "PyTorch's fused path through nn.TransformerEncoderLayer does not give the bits of its layers one by one, "
            "as they are recorded; call torch.backends.mha.set_fastpath_enabled(False) in the model's factory."
        )
    return out.shape[1]


def _same_with_hooks(model: nn.Module, images: Tensor, expected: Any) -> bool:
    """Whether the model's output is the same, bit for bit, while hooks look at its modules. The one module that takes
    another path then is PyTorch's encoder layer."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    if not encoders or not isinstance(expected, Tensor):
        return True
    hooks = [encoder.register_forward_hook(lambda *_: None) for encoder in encoders]
    try:
        return torch.equal(model(images), expected)
    finally:
        for hook in hooks:
            hook.remove()


def refuse_compiled(model: nn.Module) -> None:
    """ModelError for a model that is compiled or scripted, in whole or in part: its modules do not run one by one, so
    that nothing can be recorded or replaced."""
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.jit.ScriptModule)
            or getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
            or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(module)
        ):
            raise ModelError(
                f"{f'The module {name}' if name else 'The model'} is compiled or scripted; give the model as it is "
                "before torch.compile and torch.jit."
            )


def checkpointed(model: nn.Module) -> list[Any]:
    """The modules that recompute their activations in a backward pass (timm's `set_grad_checkpointing`). It has to be
    off where outputs are replaced: the recomputation comes when the replacement is gone."""
    return [module for module in model.modules() if getattr(module, "grad_checkpointing", False) is True]


def usable_device(device: str | torch.device) -> torch.device:
    """The device, which is there; SettingsError otherwise."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"There is no device {str(device)!r} here; use cpu, or cuda where there is a GPU."
        ) from error
    return torch.device(device)


@contextmanager
def borrowed(model: nn.Module, device: str | torch.device | None = None) -> Iterator[nn.Module]:
    """The model in eval mode, without gradients or checkpointing of them, and on `device` while the block runs, and as
    it was after it. ModelError for one that is compiled."""
    refuse_compiled(model)
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    recomputing = checkpointed(model)
    home = next(iter(wanted)).device if wanted else None
    try:
        for module in recomputing:
            module.grad_checkpointing = False
        yield model.eval().requires_grad_(False).to(device)
    finally:
        for module in recomputing:
            module.grad_checkpointing = True
        if device is not None and home is not None:
            model.to(home)
        for module, training in modes.items():
            module.training = training
        for parameter, gradients in wanted.items():
            with torch.inference_mode(parameter.is_inference()):  # a flag of tensors made there is set there
                parameter.requires_grad_(gradients)
