"""The serving configuration: environment over YAML, unknown keys refused."""

from __future__ import annotations

import pytest

from elude_runtime.api.config import ConfigError, ServingConfig


def test_environment_over_yaml_over_defaults() -> None:
    made = ServingConfig.resolve(
        {"max_edits": 3, "max_steps": 5}, {"ELUDE_MAX_EDITS": "7", "OTHER": "1", "ELUDE_TRUST_FACTORY": "true"}
    )
    assert (made.max_edits, made.max_steps, made.trust_factory, made.device) == (7, 5, True, "auto")
    assert ServingConfig.resolve(None, {}) == ServingConfig()
    assert ServingConfig.resolve({}, {"ELUDE_EXPECTED_CHECKPOINT_SHA256": "123"}).expected_checkpoint_sha256 == "123"


@pytest.mark.parametrize(
    ("yaml", "environment", "key"),
    [
        ({"max_edit": 3}, {}, "max_edit"),
        ({"max_edits": 0}, {}, "max_edits"),
        ({"threads": "many"}, {}, "threads"),
        ({}, {"ELUDE_MAX_STEPS": "-1"}, "max_steps"),
        ({}, {"ELUDE_THREADS": "nine"}, "threads"),
        ({"max_edits": None}, {}, "max_edits"),
    ],
)
def test_what_cannot_be_used_is_named(yaml: dict[str, object], environment: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` cannot be used") as caught:
        ServingConfig.resolve(yaml, environment)
    assert "\n" not in str(caught.value)


def test_every_key_is_documented() -> None:
    assert all(f.description for f in ServingConfig.model_fields.values())


def test_limits_are_those_that_bound_a_request() -> None:
    assert set(ServingConfig().limits()) == {k for k in ServingConfig.model_fields if k.startswith("max_")}
