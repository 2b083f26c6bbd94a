"""The options that say which model: shared by `layers`, `rewrite` and `verify`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from elude_runtime.errors import EludeError, ModelError

IMAGES = "A folder, a list of files (.txt), or tar shards ('train-{0000..1023}.tar'); no labels needed."
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A timm name, hf-hub:ORG/NAME or local-dir:FOLDER; leave out with --model-factory."
    ),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="The model's published weights, from the hub or its local cache.")
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights: safetensors, or a PyTorch state dict or training checkpoint (averaged weights first)."),
]
Head = Annotated[
    Path | None,
    typer.Option(help="A linear probe on the model without a head: a file with one weight and at most one bias."),
]
FactoryOption = Annotated[str | None, typer.Option("--model-factory", help="FILE.py:FUNCTION that builds the model.")]
ModelArg = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the constructor; repeated.")]
InputSize = Annotated[
    str | None, typer.Option(help="3,HEIGHT,WIDTH or one number; a transformer is built for it (img_size).")
]
Mean = Annotated[str | None, typer.Option(help="R,G,B")]
Std = Annotated[str | None, typer.Option(help="R,G,B")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, …")]
CropPct = Annotated[float | None, typer.Option(help="Input side over resized side.")]
CropMode = Annotated[str | None, typer.Option(help="center, squash or border.")]


@dataclass(frozen=True)
class ChosenModel:
    """base: the model with its weights, a `BaseModel`; labels: class names that the weights bring along; notes: what
    was decided on the way, one sentence each."""

    base: Any
    labels: list[str]
    notes: list[str]


@dataclass(frozen=True)
class ModelOptions:
    """What the options above were given as."""

    name: str | None
    pretrained: bool = False
    weights: Path | None = None
    factory: str | None = None
    args: tuple[str, ...] = ()
    head: Path | None = None
    input_size: str | None = None

    def build(self) -> Any:
        """The model with its weights, as a `BaseModel`. ModelError says what does not fit."""
        return self.choose().base

    def choose(self) -> ChosenModel:
        """The model with what else its source says. ModelError says what does not fit."""
        from elude_runtime.checkpoint.manifest import ModelSource
        from elude_runtime.network.build import Factory, json_args, load_weights
        from elude_runtime.network.timm_source import timm_model
        from elude_runtime.network.weights import read_weights
        from elude_runtime.offline.base_model import BaseModel

        arguments = json_args(list(self.args))
        if self.name and not self.factory:
            size = _input_size(self.input_size)
            made = timm_model(
                self.name, arguments, pretrained=self.pretrained, weights=self.weights, head=self.head,
                input_size=size and size[1:],
            )  # fmt: skip
            source = ModelSource(kind="timm", name=made.name, args=made.args)
            return ChosenModel(BaseModel(made.model, source), made.labels, made.notes)
        if not self.factory:
            raise ModelError("Name a timm model, or give --model-factory FILE.py:FUNCTION.")
        if self.name or self.pretrained:
            raise ModelError("--model-factory takes the place of MODEL and --pretrained; give one or the other.")
        if self.head:
            raise ModelError(
                "--head is for timm models; let the factory build the model with its head, and give the weights of "
                "both with --weights."
            )
        factory, notes = Factory.parse(self.factory), list[str]()
        model, files = factory.build(arguments)
        if self.weights:
            load_weights(model, read_weights(self.weights, notes), str(self.weights))
        source = ModelSource(
            kind="factory", name=factory.function, args=arguments, file=factory.file.name, function=factory.function
        )
        return ChosenModel(BaseModel(model, source, tuple(files), factory.file.parent), [], notes)

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
    notes: list[str] | None = None,
) -> Any:
    """timm's data configuration of the model with the options put over it. What is assumed because neither the model
    nor the options say it goes into `notes`."""
    from elude_runtime.network.preprocessing import DataConfig

    given = {
        "input_size": _input_size(input_size),
        "mean": mean and _numbers(mean, "--mean", (3,)),
        "std": std and _numbers(std, "--std", (3,)),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    made = DataConfig.of_model(model, **given)
    silent = [k for k, v in given.items() if v is None]
    if notes is not None and silent and not getattr(model, "pretrained_cfg", None):
        assumed = ", ".join(f"{k} {getattr(made, k)}" for k in silent)
        notes.append(f"The model does not say how its images are prepared; assumed: {assumed}.")
    return made


def read_labels(path: Path | None, classes: int) -> list[str] | None:
    """Class names: a text file with one a line, a JSON list of names, or of {"index", "label" or "name"}.

    EludeError unless there is one a class; classes: how many the model has, 0 for an embedding.
    """
    if path is None:
        return None
    names = _labels_in(path)
    if not classes:
        raise EludeError(
            f"{path} names classes and the model has none: leave --labels out, or give a probe with --head."
        )
    if len(names) != classes:
        raise EludeError(f"{path} names {len(names)} classes, the model has {classes}.")
    return names


def _labels_in(path: Path) -> list[str]:
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
    except FileNotFoundError:
        raise EludeError(f"There is no file {path} for --labels.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EludeError(
            f"The labels in {path} cannot be read; give one name a line, or a JSON list of names or of "
            '{"index": 0, "label": "…"}.'
        ) from error


def _input_size(text: str | None) -> tuple[int, int, int] | None:
    """(channels, height, width) of `3,HEIGHT,WIDTH` or of one number."""
    if text is None:
        return None
    size = _numbers(text, "--input-size", (1, 3))
    size = (3.0, *(size * 2)) if len(size) == 1 else size
    if any(v != int(v) or v < 1 for v in size):
        raise EludeError(f"The input size {text} cannot be used: --input-size takes whole numbers above zero.")
    return int(size[0]), int(size[1]), int(size[2])


def _numbers(text: str, option: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(math.isfinite(v) for v in values):
        raise EludeError(f"{option} takes {' or '.join(map(str, counts))} numbers with commas, not {text!r}.")
    return values
