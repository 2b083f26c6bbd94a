"""A timm model from what a user names (registry, hub, folder, weights, probe, input size), and how disk alone gives it
back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import load_model_config_from_hf
from torch import nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import build_timm
from elude_runtime.network.head import Probe, read_probe, with_probe
from elude_runtime.network.labels import labels_of
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.weights import fit_weights, noting_resampling, read_weights


@dataclass(frozen=True)
class TimmModel:
    """A model with its weights. `timm.create_model(name, **args)` builds it again without hub, weights or folder.

    labels: class names, where the published weights say them for certain; notes: what a user should know.
    """

    model: nn.Module
    name: str
    args: dict[str, Any]
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def timm_model(
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    head: Path | None = None,
    input_size: tuple[int, int] | None = None,
) -> TimmModel:
    """Build a timm model as the options of `elude rewrite` say.

    name: `ARCH`, `ARCH.TAG`, `timm/ARCH.TAG`, `hf-hub:ORG/NAME[@REVISION]` or `local-dir:FOLDER` (with config.json).
    pretrained: its published weights, from the hub or the local cache, or from the folder. weights: a local file, whose
    classifier says the number of classes unless `args` do (num_classes=0 leaves it out). head: a linear probe on the
    model without a head; it takes the place of any other classifier. input_size: (height, width); an architecture that
    is built for one size is built for this one. ModelError, one sentence, for what does not fit together.
    """
    if pretrained and weights:
        raise ModelError("--pretrained and --weights both bring the weights; give one of them.")
    if head and not (pretrained or weights):
        raise ModelError("--head is a probe on a trained body; give the body's weights with --pretrained or --weights.")
    notes: list[str] = []
    source = _Source.of(name, args or {})
    probe = read_probe(head) if head else None
    given = (args or {}).get("num_classes")
    if probe and given not in (None, 0, probe.classes):
        raise ModelError(f"{head} has {probe.classes} classes and num_classes={given} contradicts it; leave it out.")
    source = source.for_size(input_size, (args or {}).get("img_size"))
    if weights:
        tensors = read_weights(weights, notes)
        headless = probe is not None or given == 0
        model = fit_weights(source.build, tensors, str(weights), notes, given, headless=headless)
    elif pretrained:
        model = _published(source, given, probe, notes)
    else:
        model = source.build(None)
    if probe:
        size = (3, *input_size) if input_size else DataConfig.of_model(model).input_size
        model = with_probe(source.build, model, probe, size, notes)
    labels = labels_of(model, name) if pretrained and not probe else []
    return TimmModel(model, *source.rebuilt_as(model), labels, notes)


@dataclass(frozen=True)
class _Source:
    """What timm.create_model takes. from_file: a config.json says it, which a checkpoint must do without."""

    name: str
    args: dict[str, Any]
    from_file: bool = False

    @classmethod
    def of(cls, name: str, args: Mapping[str, Any]) -> _Source:
        kind, separator, where = name.partition(":")
        kind = kind.lower().replace("hf_hub", "hf-hub")
        if not separator:
            return cls(name.removeprefix("timm/"), dict(args))
        if kind not in ("hf-hub", "local-dir") or not where:
            raise ModelError(f"{name} is no source that timm has; give ARCH.TAG, hf-hub:ORG/NAME or local-dir:FOLDER.")
        saved = _saved_args(kind, where)
        return cls(f"{kind}:{where}", {**saved, **args}, from_file=True)

    def build(self, classes: int | None, *, pretrained: bool = False) -> nn.Module:
        """The model, without its weights unless asked for them; with K classes, or as timm and the arguments say."""
        changes = {} if classes is None else {"num_classes": classes}
        return build_timm(self.name, {**self.args, **changes}, pretrained=pretrained)

    def for_size(self, size: tuple[int, int] | None, asked: Any) -> _Source:
        """The source of the same model for images of another size, where its architecture is built for one.

        asked: the argument img_size, where the user gave it too.
        """
        if size is None or self.args.get("dynamic_img_size") or self.args.get("strict_img_size") is False:
            return self
        if asked is not None and _pair(asked) != size:
            raise ModelError(f"img_size={asked} and the input size {size[0]} x {size[1]} contradict each other.")
        model: Any = self.build(None)
        patch = _pair(getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1)
        if not model.pretrained_cfg.get("fixed_input_size"):
            return self
        if size[0] % patch[0] or size[1] % patch[1]:
            near = ",".join(str(max(1, s // p) * p) for s, p in zip(size, patch, strict=True))
            raise ModelError(
                f"{self.name} cuts images into patches of {patch[0]} x {patch[1]} pixels, and {size[0]} x {size[1]} is "
                f"no multiple of that; give --input-size 3,{near} or another multiple."
            )
        if _pair(DataConfig.of_model(model).input_size[1:]) == size:
            return self
        return _Source(self.name, {**self.args, "img_size": list(size)}, self.from_file)

    def rebuilt_as(self, model: nn.Module) -> tuple[str, dict[str, Any]]:
        """(name, arguments) that build `model` from disk alone. ModelError where timm's registry builds another."""
        args = dict(self.args)
        if hasattr(model, "num_classes"):
            args["num_classes"] = model.num_classes
        if not self.from_file:
            return self.name, args
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        if config.get("fixed_input_size"):  # the file said the size; the architecture's own default may be another
            args.setdefault("img_size", list(config["input_size"][1:]))
        name = str(config["architecture"])
        again = build_timm(name, args)
        if repr(again) != repr(model) or _shapes(again) != _shapes(model):
            raise ModelError(
                f"timm builds another model than {self.name} from the name {name} and {args}, so a checkpoint could "
                "not be loaded without it; build it in a --model-factory."
            )
        return name, args


def _published(source: _Source, given: int | None, probe: Probe | None, notes: list[str]) -> nn.Module:
    """The model with the weights that timm, the hub or the folder has for it."""
    with noting_resampling() as resampled:
        model = source.build(0 if probe else None, pretrained=True)
    published = model.pretrained_cfg["num_classes"]  # type: ignore[index]
    if given and not probe and given != published:
        raise ModelError(
            f"{source.name} comes with {published} classes, so a head for num_classes={given} would be random; give it "
            "with --head, or the fine-tuned model with --weights."
        )
    if resampled:
        notes.append(
            f"timm resampled the position embeddings of {source.name} to this input size: the base model is the "
            "resampled one."
        )
    return model


def _saved_args(kind: str, where: str) -> dict[str, Any]:
    """The constructor's arguments in a hub's or folder's config.json."""
    try:
        if kind == "hf-hub":
            return dict(load_model_config_from_hf(where)[2] or {})
        config = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
        return dict(config.get("model_args") or {})
    except Exception as error:  # the hub client raises anything, and so does a file of another kind
        if kind == "local-dir":
            text = f"{where} holds no config.json such as timm.models.save_for_hf writes; give a folder that has one."
        else:
            text = (
                f"{where} is not in the local hub cache, and the hub does not answer with it; check the name and the "
                "network, or give an architecture's name and a file with --weights."
            )
        raise ModelError(text) from error


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {n: t.shape for n, t in model.state_dict().items()}


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
