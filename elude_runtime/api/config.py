"""`elude:` in model-config.yaml: everything an operator can set. Environment over YAML over the checkpoint's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elude_runtime.errors import EludeError

ENVIRONMENT_PREFIX = "ELUDE_"


class ConfigError(EludeError):
    """A serving configuration with an unknown key or an impossible value."""


class ServingConfig(BaseModel):
    """How one server process serves a checkpoint; each key also as the environment variable ELUDE_<KEY>."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field("auto", description="torch device; auto: the GPU that the server assigned, else cpu")
    threads: int | None = Field(None, ge=1, description="torch threads of a worker; default: torch's own choice")
    trust_factory: bool = Field(False, description="run the model factory that a checkpoint carries")
    expected_checkpoint_sha256: str | None = Field(None, description="refuse to serve any other checkpoint")
    max_image_bytes: int = Field(5_000_000, ge=1, description="encoded size of one image")
    max_image_pixels: int = Field(50_000_000, ge=1, description="width x height of one image")
    max_targets: int = Field(10, ge=1, description="explanation targets of one request, `top` counted out")
    max_layers: int = Field(8, ge=1, description="layers explained in one request")
    max_top_features: int = Field(200, ge=1, description="features listed a target and layer")
    max_ablations: int = Field(64, ge=1, description="features ablated one by one in one request")
    max_steps: int = Field(64, ge=1, description="integration nodes")
    max_tail_rows: int = Field(512, ge=1, description="images re-run through the tail for one request")
    max_edits: int = Field(64, ge=1, description="edits in one request")
    max_json_depth: int = Field(32, ge=2, description="nesting of a request document")
    max_response_bytes: int = Field(6_000_000, ge=10_000, description="below TorchServe's own max_response_size")

    @classmethod
    def resolve(
        cls, yaml: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> ServingConfig:
        """YAML values with the environment's put over them. ConfigError names the key that cannot be used."""
        values = dict(yaml or {})
        for key in cls.model_fields:
            text = (os.environ if environment is None else environment).get(ENVIRONMENT_PREFIX + key.upper())
            if text is not None:
                values[key] = text  # pydantic reads "7" and "true" where the key is a number or a switch
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "elude"
            raise ConfigError(f"The serving configuration's `{key}` cannot be used: {first['msg']}.") from error

    def limits(self) -> dict[str, int]:
        """The keys that bound a request, as describe shows them."""
        return {k: v for k, v in self.model_dump().items() if k.startswith("max_")}
