"""Reads replies of a newer server: keys and enumeration values that this version does not know are no errors."""

from __future__ import annotations

from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, create_model

M = TypeVar("M", bound=BaseModel)


def read_reply(model: type[M], body: bytes) -> M:
    """The document in `body`. Unknown keys are left out; a text where the schema lists the texts it knows (an
    enumeration) may be another one. All else is validated. Raises pydantic.ValidationError."""
    made: M = _own(_lenient(model).model_validate_json(body))
    return made


def _own(value: Any) -> Any:
    """The schema's own documents in place of lenient ones, so that they compare and pickle like any others."""
    if isinstance(value, BaseModel):
        fields = {name: _own(getattr(value, name)) for name in type(value).model_fields}
        return type(value).__bases__[0].model_construct(value.model_fields_set, **fields)  # type: ignore[attr-defined]
    if isinstance(value, list):
        # A direction or a heatmap has thousands of numbers and no documents.
        return [_own(one) for one in value] if value and isinstance(value[0], BaseModel | list | dict) else value
    return value


@cache
def _lenient(model: type[BaseModel]) -> type[BaseModel]:
    """A subclass that takes more."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        widened = _widen(field.annotation)
        if widened is not field.annotation:
            fields[name] = (widened, field)
    settings = {"extra": "ignore"}
    return create_model(model.__name__, __base__=model, __cls_kwargs__=settings, __module__=__name__, **fields)


def _widen(kind: Any) -> Any:
    """The same type with lenient documents in place of strict ones, and any text in place of listed texts."""
    if isinstance(kind, type) and not get_args(kind):
        return _lenient(kind) if issubclass(kind, BaseModel) else kind
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return str if all(isinstance(value, str) for value in inner) else kind
    if origin is Annotated:
        return Annotated[(_widen(inner[0]), *kind.__metadata__)]
    if origin in (Union, UnionType):
        return Union[tuple(NoneType if part is NoneType else _widen(part) for part in inner)]  # noqa: UP007
    if origin in (list, dict):
        return origin[tuple(_widen(part) for part in inner)]
    return kind
