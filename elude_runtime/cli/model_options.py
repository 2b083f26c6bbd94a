"""The options that say which model: shared by `layers`, `rewrite` and `verify`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from elude_runtime.errors import EludeError, ModelError

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A timm model name; leave out with --model-factory.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load timm's weights from the hub or its local cache.")]
Weights = Annotated[Path | None, typer.Option(help="Weights: safetensors, or a PyTorch state dict.")]
FactoryOption = Annotated[str | None, typer.Option("--model-factory", help="FILE.py:FUNCTION that builds the model.")]
ModelArg = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the constructor; repeated.")]
InputSize = Annotated[str | None, typer.Option(help="3,HEIGHT,WIDTH or one number.")]
Mean = Annotated[str | None, typer.Option(help="R,G,B")]
Std = Annotated[str | None, typer.Option(help="R,G,B")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, …")]
CropPct = Annotated[float | None, typer.Option(help="Input side over resized side.")]
CropMode = Annotated[str | None, typer.Option(help="center, squash or border.")]


@dataclass(frozen=True)
class ModelOptions:
    """What the options above were given as."""

    name: str | None
    pretrained: bool = False
    weights: Path | None = None
    factory: str | None = None
    args: tuple[str, ...] = ()

    def build(self) -> Any:
        """The model with its weights, as a `BaseModel`. ModelError says what does not fit."""
        from elude_runtime.checkpoint.manifest import ModelSource
        from elude_runtime.network.build import Factory, build_timm, json_args, load_weights, read_weights
        from elude_runtime.offline.rewrite import BaseModel

        arguments = json_args(list(self.args))
        if self.factory:
            if self.name or self.pretrained:
                raise ModelError("--model-factory takes the place of MODEL and --pretrained; give one or the other.")
            factory = Factory.parse(self.factory)
            model, files = factory.build(arguments)
            source = ModelSource(
                kind="factory", name=factory.function, args=arguments, file=factory.file.name, function=factory.function
            )
            base = BaseModel(model, source, tuple(files), factory.file.parent)
        elif self.name:
            model = build_timm(self.name, arguments, pretrained=self.pretrained)
            if hasattr(model, "num_classes"):
                arguments.setdefault("num_classes", model.num_classes)
            # a checkpoint is loaded without the hub: it names the architecture that a hub's model turned out to be
            name = str(vars(model)["pretrained_cfg"]["architecture"]) if ":" in self.name else self.name
            base = BaseModel(model, ModelSource(kind="timm", name=name, args=arguments))
        else:
            raise ModelError("Name a timm model, or give --model-factory FILE.py:FUNCTION.")
        if self.weights:
            load_weights(base.model, read_weights(self.weights), str(self.weights))
        return base

    @property
    def random(self) -> bool:
        """Whether nothing says where weights come from (a factory may bring its own)."""
        return not (self.pretrained or self.weights or self.factory)


def data_config(
    model: Any,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
    crop_pct: float | None,
    crop_mode: str | None,
) -> Any:
    """timm's data configuration of the model with the options put over it."""
    from elude_runtime.network.preprocessing import DataConfig

    size: tuple[float, ...] | None = None
    if input_size is not None:
        size = _numbers(input_size, "--input-size", (1, 3))
        size = (3.0, *(size * 2)) if len(size) == 1 else size
        if any(v != int(v) for v in size):
            raise EludeError(f"--input-size takes whole numbers, not {input_size!r}.")
    return DataConfig.of_model(
        model,
        input_size=size and tuple(int(v) for v in size),
        mean=mean and _numbers(mean, "--mean", (3,)),
        std=std and _numbers(std, "--std", (3,)),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )


def read_labels(path: Path | None) -> list[str] | None:
    """Class names: a text file with one a line, a JSON list of names, or of {"index", "label" or "name"}."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        values = json.loads(text)
        if isinstance(values, list) and all(isinstance(v, str) for v in values):
            return values
        rows = sorted(values, key=lambda v: v["index"])
        if [r["index"] for r in rows] != list(range(len(rows))):
            raise EludeError(f"The labels in {path} do not number the classes 0, 1, 2, …")
        return [str(r.get("label") or r["name"]) for r in rows]
    except EludeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EludeError(
            f"The labels in {path} cannot be read; give one name a line, or a JSON list of names or of "
            '{"index": 0, "label": "…"}.'
        ) from error


def _numbers(text: str, option: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(math.isfinite(v) for v in values):
        raise EludeError(f"{option} takes {' or '.join(map(str, counts))} numbers with commas, not {text!r}.")
    return values
