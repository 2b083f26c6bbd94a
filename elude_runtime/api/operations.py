"""The operations beside predictions: `features`, `vectors` and `describe`."""

from __future__ import annotations

import torch
from torch import Tensor

import elude_runtime
from elude_runtime.analysis.contrast import contrast
from elude_runtime.analysis.model import EludeModel
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.intake import ImageReader, from_base64
from elude_runtime.api.openapi import openapi
from elude_runtime.api.policies import PolicyBook
from elude_runtime.api.problems import PROBLEMS, Problem, at
from elude_runtime.api.replies import ReplyWriter
from elude_runtime.api.schema import operations as wire
from elude_runtime.api.schema.base import shortest_float32
from elude_runtime.api.schema.reply import ModelInfo
from elude_runtime.api.schema.request import AddEdit, ImageBytes
from elude_runtime.checkpoint.catalogue import FeatureCatalogue, FeatureFacts
from elude_runtime.checkpoint.vectors import StoredVector
from elude_runtime.errors import closest

_AT_ONCE = 8  # images of a `vectors` request in one pass


def describe(
    model: EludeModel,
    config: ServingConfig,
    info: ModelInfo,
    shares: dict[str, float],
    policies: PolicyBook,
    vectors: dict[str, StoredVector],
    compiled_difference: float | None,
) -> wire.Description:
    """shares: tail_share of every split layer; compiled_difference: None where nothing is compiled."""
    manifest = model.manifest
    return wire.Description(
        elude_version=elude_runtime.__version__,
        model=info,
        output=manifest.output,
        classes=len(manifest.labels) or None,
        layers=[
            wire.LayerInfo(
                **entry.model_dump(
                    include={"name", "kind", "neurons", "inputs", "subunits", "token_types", "grid", "follows"}
                ),
                attribution=entry.attribution.model_dump(),
                tail=model.tails.plans[entry.name].mode,
                tail_share=shares[entry.name],
            )
            for entry in manifest.layers
        ],
        data_config=manifest.data_config,
        partition_sha256=manifest.partition_sha256,
        policies=[rule.info() for rule in policies.rules.values()],
        vectors=[wire.VectorInfo(name=v.name, layer=v.layer, auc=v.auc) for v in vectors.values()],
        limits=config.limits(),
        threads=torch.get_num_threads(),
        precision=wire.PrecisionInfo(
            tf32=config.tf32,
            autocast=config.autocast,
            compiled=compiled_difference is not None,
            compiled_difference=compiled_difference,
        ),
        problems=list(PROBLEMS),
        openapi=openapi(),
    )


def features(
    asked: wire.FeaturesRequest, catalogue: FeatureCatalogue, layers: list[str], info: ModelInfo, identity: str
) -> wire.FeaturesReply:
    """A page of the catalogue. Problem for a layer that is not there, or a cursor of another list."""
    if asked.layer is not None and asked.layer not in layers:
        near = closest(asked.layer, layers) or layers
        detail = f"The checkpoint has no split layer {asked.layer[:80]!r}."
        raise Problem("unknown-layer", detail, at(["layer"], "unknown layer", near))
    offset = _offset(asked.cursor, info)
    found, total = catalogue.search(asked.query, asked.layer, asked.ids, asked.limit, offset)
    after = offset + len(found)
    return wire.FeaturesReply(
        id=identity,
        model=info,
        features=[_feature(facts) for facts in found],
        total=total,
        next_cursor=f"{info.checkpoint_sha256[:12]}.{after}" if found and after < total else None,
    )


def _offset(cursor: str | None, info: ModelInfo) -> int:
    """Where a page begins. A cursor is bound to the checkpoint, since the next one lists other features."""
    if cursor is None:
        return 0
    digest, _, number = cursor.partition(".")
    if digest != info.checkpoint_sha256[:12] or not number.isascii() or not number.isdecimal() or len(number) > 9:
        detail = "The cursor is not of this checkpoint's list; begin again without one."
        raise Problem("invalid-document", detail, at(["cursor"], "not of this list"))
    return int(number)


def _feature(facts: FeatureFacts) -> wire.FeatureInfo:
    return wire.FeatureInfo(**{name: getattr(facts, name) for name in wire.FeatureInfo.model_fields})


def check_vectors(asked: wire.VectorsRequest, model: EludeModel, config: ServingConfig) -> None:
    """Problem for an unknown layer or a limit exceeded, before any image is decoded."""
    if asked.layer not in model.layers:
        near = closest(asked.layer, model.layers) or model.layers
        detail = f"The checkpoint has no split layer {asked.layer[:80]!r}."
        raise Problem("unknown-layer", detail, at(["layer"], "unknown layer", near))
    count = len(asked.positive) + len(asked.negative)
    for name, value, limit in (
        ("The number of images", count, config.max_vector_images),
        ("top_features", asked.top_features, config.max_top_features),
    ):
        if value > limit:
            raise Problem("limit-exceeded", f"{name} is {value}, the limit is {limit}; ask for less.")


def vector_images(asked: wire.VectorsRequest, model: EludeModel, reader: ImageReader) -> tuple[Tensor, Tensor]:
    """The two sets preprocessed, [N, 3, H, W] each, on the model's device. Problem for bad images."""
    return _inputs(model, reader, "positive", asked.positive), _inputs(model, reader, "negative", asked.negative)


def vectors(
    asked: wire.VectorsRequest,
    images: tuple[Tensor, Tensor],
    model: EludeModel,
    info: ModelInfo,
    writer: ReplyWriter,
    identity: str,
) -> wire.VectorsReply:
    """What sets two sets of images, [N, 3, H, W] each, apart at one layer."""
    positive, negative = (side.split(_AT_ONCE) for side in images)
    found = contrast(model, asked.layer, positive, negative, top=asked.top_features)
    return wire.VectorsReply(
        id=identity,
        model=info,
        layer=asked.layer,
        features=[
            wire.FeatureWeight(feature=f.feature, label=writer.feature_label(f.feature), weight=f.weight, share=f.share)
            for f in found.features[: asked.top_features]
        ],
        edits=[AddEdit(feature=e.feature, mode="add", value=shortest_float32(e.value)) for e in found.edits],
        direction=found.direction.tolist(),
        auc=found.auc,
    )


def _inputs(model: EludeModel, reader: ImageReader, side: str, images: list[ImageBytes]) -> Tensor:
    inputs = []
    for number, image in enumerate(images):
        loc: list[str | int] = [side, number, "b64"]
        try:
            inputs.append(reader.read(from_base64(image.b64, loc)).tensor)
        except Problem as problem:
            raise Problem(problem.kind, f"{side}.{number}: {problem.detail}", at(loc, problem.detail)) from problem
    parameter = next(model.base.parameters())
    return torch.stack(inputs).to(parameter.device, parameter.dtype)
