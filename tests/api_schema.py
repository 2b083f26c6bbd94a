"""The published schema with what it cannot know, for schemathesis: names that are there, images, sizes, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api_faults import NOT_IMAGES
from api_strategies import IMAGES, JSON, MULTIPART, World, b64
from hypothesis import strategies as st


def formats(world: World) -> dict[str, st.SearchStrategy[Any]]:
    """Strategies by the name of a format: of names that are there, and now and then one that is not."""
    named: dict[str, tuple[str, ...]] = {
        "feature": world.features,
        "layer": world.layers,
        "label": world.labels,
        "vector": world.vectors,
        "policy": world.policies,
        "digest": (world.digest,),
    }
    found = {
        kind: st.integers(0, 19).flatmap(lambda n, names=names: st.sampled_from(names if n else ("no-such-name",)))
        for kind, names in named.items()
    }
    pictures = st.integers(0, 19).flatmap(lambda n: st.sampled_from(IMAGES if n else NOT_IMAGES))
    found["picture"] = pictures
    found["picture-b64"] = pictures.map(lambda data: b64(data)["b64"])
    return {f"elude-{kind}": strategy for kind, strategy in found.items()}


def informed(published: Mapping[str, Any]) -> dict[str, Any]:
    """The published document with formats for names and images in its requests. It takes and refuses the same."""
    made: dict[str, Any] = json.loads(json.dumps(published))
    schemas = made["components"]["schemas"]
    for name, key, kind in (
        ("When", "feature", "feature"),
        ("DenseVector", "layer", "layer"),
        ("VectorsRequest", "layer", "layer"),
        ("FeaturesRequest", "layer", "layer"),
        ("LabelTarget", "label", "label"),
        ("NamedVector", "name", "vector"),
        ("Expect", "checkpoint_sha256", "digest"),
        ("ImageBytes", "b64", "picture-b64"),
        *((name, "feature", "feature") for name in schemas if name.endswith("Edit")),
    ):
        _within(schemas, name, key)["format"] = f"elude-{kind}"
    for name, key, kind in (
        ("FeaturesRequest", "ids", "feature"),
        ("Activations", "features", "feature"),
        ("Explain", "layers", "layer"),
        ("Steer", "policies", "policy"),
    ):
        _within(schemas, name, key)["items"]["format"] = f"elude-{kind}"
    for path in made["paths"].values():
        for kind, body in path["post"]["requestBody"]["content"].items():
            if kind == MULTIPART:
                body["schema"]["properties"]["image"] = _PICTURE
            elif kind != JSON:
                body["schema"] = _PICTURE
    return made


def narrowed(published: Mapping[str, Any], world: World) -> dict[str, Any]:
    """`informed`, and with the limits and sizes that `describe` tells, so that most of its requests have an answer."""
    made = informed(published)
    schemas = made["components"]["schemas"]
    classes, width, small = len(world.labels), min(world.widths.values()), {"minimum": -9, "maximum": 9}
    for name, entry in schemas.items():
        for key in ("value", "strength", "strength_multiplier"):
            if entry.get("properties", {}).get(key, {}).get("type") == "number" and name != "FeatureWeight":
                entry["properties"][key] |= small
    for name, key, largest in (
        ("Explain", "steps", 64), ("Explain", "top_features", 6), ("TopTarget", "top", 10),
        ("IndexTarget", "index", classes), ("IndexTarget", "versus", classes), ("VectorsRequest", "top_features", 200),
    ):  # fmt: skip
        _within(schemas, name, key)["maximum"] = largest
    for name, key, longest in (
        ("Explain", "targets", 2), ("Steer", "edits", 2), ("Steer", "vectors", 1), ("VectorsRequest", "positive", 3),
        ("VectorsRequest", "negative", 3), ("V1Request", "instances", 3),
    ):  # fmt: skip
        _within(schemas, name, key)["maxItems"] = longest
    _within(schemas, "Explain", "targets")["items"]["oneOf"][1]["maximum"] = classes
    numbers = {"type": "array", "items": {"type": "number", **small}}
    schemas["DirectionTarget"]["properties"]["direction"] = {**numbers, "minItems": classes, "maxItems": classes}
    schemas["DenseVector"]["properties"]["vector"] = {**numbers, "minItems": width, "maxItems": width}
    picture, request = {"$ref": "#/components/schemas/ImageBytes"}, {"$ref": "#/components/schemas/Request"}
    with_image = {"allOf": [request, {"required": ["image"], "properties": {"image": {"type": "object"}}}]}
    schemas["V1Request"]["properties"]["instances"]["items"] = {"anyOf": [picture, with_image]}
    without = {"allOf": [request, {"properties": {"image": {"type": "null"}}}]}
    schemas["V2Parameters"]["properties"]["elude"] = {"anyOf": [without, {"type": "null"}]}
    encoded_picture = {"type": "string", "format": "elude-picture-b64"}
    schemas["V2Tensor"]["properties"] |= {
        "shape": {"const": [1]},
        "datatype": {"const": "BYTES"},
        "data": {"type": "array", "items": encoded_picture, "minItems": 1, "maxItems": 1},
    }
    return made


_PICTURE = {"type": "string", "format": "elude-picture"}


def _within(schemas: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """The schema of a property, without its null."""
    found: dict[str, Any] = schemas[name]["properties"][key]
    return next((one for one in found.get("anyOf", ()) if one.get("type") != "null"), found)
