"""What all wire documents share: strict validation, and numbers as the shortest text of a float32."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

API_VERSION = 1
# Validation names every wrong item: an endless list would cost endless time before any limit is met. Long lists of
# numbers end at the first wrong one (`fail_fast`): a million wrong cells of a mask cost 20 seconds.
LONGEST_LIST = 1000
LONGEST_VECTOR = 65_536


class Document(BaseModel):
    """Strict: no coercion, no NaN, no unknown keys (duplicate ones are refused before, by `parse_json`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def shortest_float32(value: Any) -> float:
    """The float whose text is the shortest that reads back as the same float32 (interface, "HTTP")."""
    import numpy as np

    return float(str(np.float32(value)))


Float32 = Annotated[float, BeforeValidator(shortest_float32)]
Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
"""Made of characters that a log line and a header can carry."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
"""Of a stored vector or policy."""
FeatureName = Annotated[str, Field(max_length=512)]
