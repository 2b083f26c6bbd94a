"""Makes the JSON schemas of this folder from registry packages, for custom resources that `kubernetes-validate` lacks.

    python -m venv /tmp/v && /tmp/v/bin/pip install cloudcoil-models-prometheus-operator cloudcoil-models-kubernetes
    /tmp/v/bin/pip install --no-deps kserve && /tmp/v/bin/python tests/deploy/schemas/make_schemas.py

Both packages are generated from the operators' own definitions and are of Apache-2.0; only names and types are taken.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIMPLE = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
# The predictors of KServe's own runtimes are not used here, and large.
SKIPPED = re.compile(
    r"V1beta1(SKLearn|XGBoost|LightGBM|TF|Triton|Torch|ONNX|PMML|Paddle|HuggingFace)\w*|V1beta1Worker\w*"
)


def servicemonitor() -> dict[str, Any]:
    """The pydantic model's schema, without texts, and closed: an unknown key is an error."""
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    schema = _bare(ServiceMonitor.model_json_schema(by_alias=True))
    schema["$comment"] = f"cloudcoil-models-prometheus-operator {version('cloudcoil.models.prometheus_operator')}"
    return dict(schema)


def inferenceservice() -> dict[str, Any]:
    """KServe's v1beta1 InferenceService; Kubernetes' own types in it are left open, for the Pod's schema to check."""
    definitions: dict[str, Any] = {}
    _define("V1beta1InferenceService", definitions)
    root = {"$ref": "#/$defs/V1beta1InferenceService", "$defs": definitions}
    return {**root, "$comment": f"kserve {version('kserve')}"}


def _bare(node: Any, named: bool = False) -> Any:
    """Without titles, descriptions and defaults; `named`: the keys of this mapping are names and not keywords."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _bare(value, key in {"properties", "$defs"} and not named)
        for key, value in node.items()
        if named or key not in {"title", "description", "default", "examples"}
    }
    if not named and "properties" in kept:
        kept["additionalProperties"] = False
    return kept


def _define(name: str, definitions: dict[str, Any]) -> None:
    """Adds the schema of one of KServe's classes, and of those that it names."""
    folder = Path(str(importlib.util.find_spec("kserve").origin)).parent / "models"  # type: ignore[union-attr]
    definitions[name] = {}
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                tables = {
                    target.id: ast.literal_eval(item.value)
                    for item in node.body
                    if isinstance(item, ast.Assign) and isinstance(target := item.targets[0], ast.Name)
                }
                keys, types = tables["attribute_map"], tables["openapi_types"]
                properties = {keys[own]: _type(types[own], definitions) for own in sorted(keys)}
                definitions[name] = {"type": "object", "properties": properties, "additionalProperties": False}


def _type(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    if found := re.fullmatch(r"list\[(.*)\]", name):
        return {"type": "array", "items": _type(found[1], definitions)}
    if found := re.fullmatch(r"dict\(str, (.*)\)", name):
        return {"type": "object", "additionalProperties": _type(found[1], definitions)}
    if name in SIMPLE:
        return {"type": SIMPLE[name]}
    if not name.startswith("V1beta1") or SKIPPED.fullmatch(name):
        return {"type": "object"} if name.startswith("V1") and name != "V1Time" else {}
    if name not in definitions:
        _define(name, definitions)
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    for make in (servicemonitor, inferenceservice):
        text = json.dumps(make(), indent=1, sort_keys=True)
        (HERE / f"{make.__name__}.json").write_text(text + "\n", encoding="utf-8")
        print(make.__name__, len(text))
