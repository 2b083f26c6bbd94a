"""The parts of the certificate that compare outputs, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import SettingsError
from elude_runtime.network.compiled import CompiledNetwork
from elude_runtime.offline.images import ImageSource, Progress


@dataclass(frozen=True)
class Check:
    """One part of the certificate. holds: None where it could not be checked; figures: numbers as measured; detail: one
    sentence for a person."""

    name: str
    holds: bool | None
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes; a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _batches(
    source: ImageSource, base: nn.Module, batch_sizes: tuple[int, ...], report: Progress, stage: str
) -> Iterator[tuple[int, Tensor]]:
    """(batch size, batch [B, 3, H, W] as `base` takes it): all images at each of the sizes."""
    parameter = next(base.parameters())
    for images in source.batches():
        images = images.to(parameter.device, parameter.dtype)
        for size in batch_sizes:
            for batch in images.split(size):
                yield size, batch
        report(stage, len(images), source.count)


def check_logits(
    model: EludeModel, base: nn.Module, source: ImageSource, batch_sizes: tuple[int, ...], report: Progress
) -> tuple[list[Check], int]:
    """Bit-equality of the outputs at every batch size, by the path that the server takes; and top-1 agreement."""
    unequal = dict.fromkeys(batch_sizes, 0)
    agree = count = 0
    with torch.no_grad():
        for size, batch in _batches(source, base, batch_sizes, report, "outputs"):
            expected, recorded = base(batch), model.record(batch).logits
            unequal[size] += len(batch) if not same_bits(recorded, expected) else 0
            if size == batch_sizes[-1]:
                unequal[size] += 0 if same_bits(model(batch), expected) else len(batch)
                agree += int((recorded.argmax(-1) == expected.argmax(-1)).sum())
                count += len(batch)
    bad = {size: n for size, n in unequal.items() if n}
    figures = {"images": count, "unequal_rows": {str(k): v for k, v in unequal.items()}}
    sizes = ", ".join(map(str, batch_sizes))
    detail = f"The outputs of {count} images are bit-equal at batch sizes {sizes}."
    if bad:
        detail = (
            f"{sum(bad.values())} output rows differ from the base model's, at batch sizes {', '.join(map(str, bad))}."
        )
    top1 = Check(
        "top1_agreement",
        agree == count,
        f"{agree} of {count} images have the same top class.",
        {"agreement": agree / count},
    )
    return [Check("logits", not bad, detail, figures), top1], count


def check_compiled(
    rebuilt: nn.Module, base: nn.Module, source: ImageSource, batch_sizes: tuple[int, ...], report: Progress
) -> Check:
    """Bit-equality of the outputs of both networks under torch.compile, as a server with `compile` computes
    them, at torch's own precision. What cannot be compiled here is not checked."""
    report("compiling", 0, None)
    unequal = count = 0
    try:
        ours, theirs = (CompiledNetwork(model, source.config.input_size) for model in (rebuilt, base))
        for size, batch in _batches(source, base, batch_sizes, report, "compiled outputs"):
            unequal += 0 if same_bits(ours.run(batch), theirs.run(batch)) else len(batch)
            count += len(batch) if size == batch_sizes[-1] else 0
    except SettingsError as error:
        return Check("compiled", None, str(error))
    except RuntimeError as error:  # the rest of the certificate is there, and is written
        return Check("compiled", None, f"Not compared, for a batch did not run: {' '.join(str(error).split())[:300]}")
    figures = {"images": count, "unequal_rows": unequal, "difference_to_plain": ours.difference}
    sizes = ", ".join(map(str, batch_sizes))
    detail = f"Compiled, the outputs of {count} images are bit-equal at batch sizes {sizes}."
    if unequal:
        detail = f"Compiled, {unequal} output rows differ from the compiled base model's."
    return Check("compiled", not unequal, detail, figures)
