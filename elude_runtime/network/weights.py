"""Weights files as people have them: wrappers taken off, classes counted, foreign names translated by timm's filter."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elude_runtime.errors import ModelError
from elude_runtime.network.build import load_weights, misfit

# In timm's order: averaged weights first, they are the ones that training scripts report.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile and DistributedDataParallel, in either order


def read_weights(path: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a PyTorch file read without unpickling code.

    In a training checkpoint it is looked for under `WRAPPERS`; what was passed over goes into `notes`. Prefixes of
    DistributedDataParallel and torch.compile are taken off the names.
    """
    if not path.is_file():
        raise ModelError(f"The weights file {path} is not there.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # timm's training checkpoints carry their arguments, which are plain values in an argparse.Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} cannot be read as weights ({reason}).") from error
    except Exception as error:
        raise ModelError(
            f"{path} holds more than tensors and is not unpickled; save its state dict as safetensors."
        ) from error
    found = [key for key in WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)]
    if found:
        state = state[found[0]]
        if len(found) > 1 and notes is not None:
            notes.append(f"{path} holds {' and '.join(found)}; {found[0]} was taken.")
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise ModelError(
            f"{path} holds no state dict (a mapping of names to tensors), neither by itself nor under "
            f"{', '.join(WRAPPERS)}, but {keys or 'nothing'}; save the model's state_dict()."
        )
    return {_bare(name): tensor for name, tensor in state.items()}


def fit_weights(
    build: Callable[[int | None], nn.Module],
    tensors: Mapping[str, Tensor],
    source: str,
    notes: list[str],
    classes: int | None = None,
    *,
    headless: bool = False,
) -> nn.Module:
    """The timm model that a state dict belongs to, with its weights.

    build(K): the model without weights, with K classes (None: as timm has it). classes: K where it is given; otherwise
    it is what the classifier in the file has, 0 where the file has none. headless: leave a classifier in the file out.
    A file with other names is translated by the filter that timm has for that architecture, unless that would resample
    anything. ModelError says what does not fit.
    """
    model = build(0 if headless else classes)
    best: tuple[int, str] | None = None
    for translated, candidate in _candidates(model, tensors):
        if headless:
            heads = tuple(f"{n}." for n in classifier_names(model))
            candidate = {n: t for n, t in candidate.items() if not n.startswith(heads)}
        problem, other = misfit(model, candidate), model
        if problem and classes is None and not headless:
            wanted = _classes(model, candidate)
            if wanted is not None and wanted != model.num_classes:
                other = build(wanted)
                problem = misfit(other, candidate)
        if not problem:
            if translated:
                notes.append(f"{source}: {translated} ({len(tensors)} tensors became {len(candidate)}).")
            if other is not model and not other.num_classes:
                notes.append(f"{source} has no classifier, so the model's output is its embedding.")
            load_weights(other, candidate, source)
            return other
        told = (len(set(other.state_dict()) ^ set(candidate)), problem + _advice(other, candidate))
        best = told if best is None or told[0] < best[0] else best
    raise ModelError(f"{source} does not fit the model: {best[1] if best else 'it is empty'}.")


def classifier_names(model: Any) -> list[str]:
    """The names of the modules that timm calls the model's classifier."""
    config = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("classifier")
    if named:
        return [named] if isinstance(named, str) else list(named)
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = found if isinstance(found, tuple | list) else (found,)
    return [n for n, m in model.named_modules() if any(m is head for head in heads)]


@contextmanager
def noting_resampling() -> Iterator[list[str]]:
    """Collects the interpolations that run inside the block: position embeddings of another size."""
    with _Interpolations() as seen:
        yield seen.names


class _Interpolations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "upsample" in name or "grid_sampler" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _candidates(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """(what was done, state dict): as it is, without a prefix that all names share, by timm's filter."""
    yield "", tensors
    prefixes = {name.partition(".")[0] + "." for name in tensors}
    if len(prefixes) == 1 and all("." in name for name in tensors):
        prefix = prefixes.pop()
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        yield f"the prefix {prefix} was taken off its names", tensors
    translate = _timm_filter(model)
    if translate is None:
        return
    try:
        with noting_resampling() as resampled:
            found = translate(dict(tensors), model)
    except Exception:  # a filter meets names that it does not expect
        return
    if not resampled and isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values()):
        yield "timm's filter for published weights translated it", found


def _timm_filter(model: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], Any] | None:
    """The function by which timm translates published weights of this architecture, where it has one."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    try:
        module = sys.modules[model_entrypoint(architecture).__module__]  # type: ignore[arg-type]
    except (KeyError, RuntimeError, TypeError):
        return None
    return getattr(module, "checkpoint_filter_fn", None)


def _classes(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """How many classes the classifier in a state dict has, 0 without one; None where that cannot be told."""
    names = classifier_names(model)
    if not names:
        return None
    weights = [tensors[f"{n}.weight"] for n in names if f"{n}.weight" in tensors]
    sizes = {w.shape[0] for w in weights if w.dim() > 1}
    if len(sizes) == 1:
        return sizes.pop()
    return None if weights else 0


def _advice(model: Any, tensors: Mapping[str, Tensor]) -> str:
    """What to do about a state dict that does not fit."""
    theirs, ours = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    embed = getattr(model, "patch_embed", None)
    patch, own = getattr(embed, "patch_size", None), getattr(embed, "num_patches", None)
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor) and patch and own and theirs.dim() == ours.dim() == 3:
        patches = theirs.shape[1] - (ours.shape[1] - own)
        side = math.isqrt(max(0, patches))
        if theirs.shape != ours.shape and theirs.shape[2] == ours.shape[2]:
            size = f"3,{side * patch[0]},{side * patch[1]}" if side**2 == patches else "3,HEIGHT,WIDTH"
            return (
                f"; its position embeddings are for {patches} patches and are not resampled: give the size that it was "
                f"trained for, --input-size {size}"
            )
    return "; check the model's name and arguments"


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
