"""`elude:` in model-config.yaml: everything an operator can set. Environment over YAML over the checkpoint's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from elude_runtime.api.schema.request import Policy
from elude_runtime.errors import EludeError

ENVIRONMENT_PREFIX = "ELUDE_"


class ConfigError(EludeError):
    """A serving configuration with an unknown key or an impossible value."""


def _listed(value: Any) -> Any:
    """An environment variable's `a, b` as a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _switched_on(value: Any) -> bool:
    """Whether pydantic reads the value of a switch as true; what it cannot read is refused later."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


Autocast = Literal["bfloat16", "float16"]
Names = Annotated[list[str], BeforeValidator(_listed)]


class ServingConfig(BaseModel):
    """How one server process serves a checkpoint; each key but `policies` also as the environment variable
    ELUDE_<KEY>. A unit of work is the price of one prediction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field("auto", description="torch device; auto: the GPU that the server assigned, else cpu")
    threads: int | None = Field(None, ge=1, description="torch threads of a worker; default: torch's own choice")
    keep_memory_bytes: int = Field(268_435_456, ge=0, lt=2**31, description="freed memory kept for the next batch")
    tf32: bool = Field(False, description="TF32 in matrix products and convolutions, on GPUs that have it")
    autocast: Autocast | None = Field(None, description="forward passes in this type where torch's autocast allows it")
    compile: bool = Field(False, description="predictions by torch.compile; a start takes minutes longer")
    trust_factory: bool = Field(False, description="run the model factory that a checkpoint carries")
    expected_checkpoint_sha256: str | None = Field(None, description="refuse to serve any other checkpoint")
    policies: dict[str, Policy] = Field(default_factory=dict, description="policies beside the checkpoint's own")
    default_policies: Names = Field(default_factory=list, description="policies in force on every request")
    shadow_policies: Names = Field(default_factory=list, description="policies computed, but not answered by")
    policies_off: bool = Field(False, description="no policy is in force, whoever names it")
    metrics_dir: Path | None = Field(None, description="folder that `elude exporter` reads; none: no such metrics")
    log_requests: bool = Field(True, description="a JSON line in the log for every request")
    drift_sample: float = Field(0.1, ge=0, le=1, description="share of the images on which features are watched")
    drift_features: Names = Field(default_factory=list, description="features watched beside the concepts")
    drift_most: int = Field(256, ge=0, description="features watched, those with the largest shares of variance")
    max_image_bytes: int = Field(5_000_000, ge=1, description="encoded size of one image")
    max_image_pixels: int = Field(50_000_000, ge=1, description="width x height of one image")
    max_request_pixels: int = Field(100_000_000, ge=1, description="width x height of all images of one request")
    max_instances: int = Field(32, ge=1, description="images of one KServe request")
    max_vector_images: int = Field(64, ge=1, description="images of one `vectors` request")
    max_targets: int = Field(10, ge=1, description="explanation targets of one request, `top` counted out")
    max_layers: int = Field(8, ge=1, description="layers explained in one request")
    max_top_features: int = Field(200, ge=1, description="features listed a target and layer")
    max_heatmaps: int = Field(200, ge=1, description="heatmaps of one request, each `pixels` another")
    max_ablations: int = Field(64, ge=1, description="features ablated one by one in one request")
    max_steps: int = Field(64, ge=1, description="integration nodes")
    max_edits: int = Field(64, ge=1, description="edits and vectors in one request")
    max_activations: int = Field(200, ge=1, description="features whose activations one request asks for")
    max_work: int = Field(64, ge=1, description="work of one request beside its prediction")
    max_batch_work: int = Field(128, ge=1, description="work of one batch beside its predictions; beyond it 503")
    max_json_depth: int = Field(32, ge=2, description="nesting of a request document")
    max_response_bytes: int = Field(6_000_000, ge=10_000, description="below TorchServe's own max_response_size")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_batch_work < max(self.max_work, self.max_vector_images):
            raise ValueError("max_batch_work is below max_work or max_vector_images, so some requests can never run")
        both = sorted(set(self.default_policies) & set(self.shadow_policies))
        if both:
            raise ValueError(f"the policy {both[0]!r} is both in default_policies and in shadow_policies")
        return self

    @classmethod
    def resolve(
        cls, yaml: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> ServingConfig:
        """YAML values with the environment's put over them. ConfigError names the key that cannot be used."""
        values: dict[str, Any] = dict(yaml or {})
        for key in cls.model_fields:
            text = (os.environ if environment is None else environment).get(ENVIRONMENT_PREFIX + key.upper())
            if text is not None and key != "policies":
                values[key] = text  # pydantic reads "7" and "true" where the key is a number or a switch
        if _switched_on(values.get("policies_off")):  # it has to work just when a policy is at fault
            for key in ("policies", "default_policies", "shadow_policies"):
                values.pop(key, None)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "elude"
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"The serving configuration's `{key}` cannot be used: {reason}.") from error

    def limits(self) -> dict[str, int]:
        """The keys that bound a request, as describe shows them."""
        return {k: v for k, v in self.model_dump().items() if k.startswith("max_")}
