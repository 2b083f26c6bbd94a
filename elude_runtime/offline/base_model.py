"""A base model with its weights, and how it is built again without them, checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elude_runtime.checkpoint.manifest import ModelSource
from elude_runtime.errors import ModelError
from elude_runtime.network.build import Factory, build_timm, carry_files, load_weights
from elude_runtime.network.conditions import borrowed, output_size, refuse_compiled
from elude_runtime.network.preprocessing import DataConfig


@dataclass(frozen=True)
class BaseModel:
    """A base model with its weights, and how it is built again without them."""

    model: nn.Module
    source: ModelSource
    factory_files: tuple[Path, ...] = ()
    factory_root: Path | None = None

    @property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the factory's files, by their names below its folder."""
        root = self.factory_root or Path()
        return {f.relative_to(root).as_posix(): _file_sha256(f) for f in self.factory_files}


def describe_model(model: nn.Module, factory: str | None, args: dict[str, Any] | None) -> BaseModel:
    """How a model in memory is built again, checked: ModelError when it cannot be."""
    refuse_compiled(model)
    try:
        json.dumps(args)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"The checkpoint cannot hold model_args ({error}); give names and numbers, act_layer='relu' for a class."
        ) from error
    if factory:
        made = Factory.parse(factory)
        again, files = made.build(args)
        source = ModelSource(
            kind="factory", name=made.function, args=args or {}, file=made.file.name, function=made.function
        )
        described = BaseModel(model, source, tuple(files), made.file.parent)
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        if not name:
            raise ModelError(
                "This model was not made by timm.create_model; give factory='FILE.py:FUNCTION' that builds it."
            )
        arguments = _own_arguments(model) if args is None else args
        again = build_timm(name, arguments)
        described = BaseModel(model, ModelSource(kind="timm", name=name, args=arguments))
    size = DataConfig.of_model(model).input_size
    if repr(model) == repr(again):
        output_size(model, size)  # says in a sentence what is wrong with a model that does not run
    if repr(model) == repr(again) and _same_network(model, again, size):
        return described
    raise ModelError(
        f"{described.source.name} built again is another network than the one given; name its arguments with "
        "model_args={...}, or give factory='FILE.py:FUNCTION' that builds it."
    )


def _own_arguments(model: nn.Module) -> dict[str, Any]:
    """What timm.create_model was given, as far as the model remembers and a manifest can hold it."""
    kept = getattr(model, "_model_args", None) or {}
    plain = {k: v for k, v in kept.items() if isinstance(v, str | int | float | bool | None | list | tuple | dict)}
    return {**plain, **({"num_classes": model.num_classes} if hasattr(model, "num_classes") else {})}


def _same_network(model: nn.Module, again: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether `again`, with the same tensors, answers two random images of that size bit for bit as `model` does."""
    try:
        load_weights(again, {n: t.cpu() for n, t in model.state_dict().items()}, "the model")
        first = next(model.parameters())
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
        with borrowed(model), borrowed(again, first.device), torch.no_grad():
            return torch.equal(model(images).nan_to_num(), again(images).nan_to_num())  # broken weights are told later
    except ModelError:
        return False


def carry_factory(base: BaseModel, work: Path, data: DataConfig) -> dict[str, str]:
    """Copy a factory's files into the checkpoint; their SHA-256 by name. The copy must build the same network, or the
    checkpoint could not be loaded."""
    if base.source.kind != "factory" or base.factory_root is None:
        return {}
    names = carry_files(list(base.factory_files), base.factory_root, work / "factory")
    copy = Factory(work / "factory" / str(base.source.file), str(base.source.function))
    if names and not _same_network(base.model, copy.build(base.source.args)[0], data.input_size):
        raise ModelError(
            "The factory's files, copied into the checkpoint, build another network; let the factory open "
            "what it needs with Python, from its own folder."
        )
    return {n: _file_sha256(work / "factory" / n) for n in names}


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
