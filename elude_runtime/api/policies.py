"""Policies on a server: which there are, which are in force by the operator's word, and the audit of both.

None is in force unless a request names it or the operator sets a default. ELUDE_POLICIES_OFF=1 turns all of them off at
the next start of the server, whatever archive and configuration say; a policy that cannot be used stops no such start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from elude_runtime.analysis.edits import Steering
from elude_runtime.analysis.model import EludeModel
from elude_runtime.api.changes import plan, steering_of
from elude_runtime.api.config import ConfigError, ServingConfig
from elude_runtime.api.problems import Problem, at, invalid_document
from elude_runtime.api.schema.operations import PolicyInfo
from elude_runtime.api.schema.request import Policy
from elude_runtime.checkpoint.policies import policy_sha256
from elude_runtime.checkpoint.vectors import StoredVector
from elude_runtime.errors import closest

audit = logging.getLogger("elude_runtime.audit")
Mode = Literal["default", "shadow", "on request", "off"]


@dataclass(frozen=True)
class Rule:
    """One policy as this server holds it. since: when it took it up, UTC; layers: that it edits."""

    name: str
    policy: Policy
    sha256: str
    steering: Steering
    mode: Mode
    since: str

    def info(self) -> PolicyInfo:
        return PolicyInfo(
            name=self.name,
            sha256=self.sha256,
            mode=self.mode,
            since=self.since,
            edits=len(self.policy.edits),
            vectors=len(self.policy.vectors),
            description=self.policy.description,
        )


class PolicyBook:
    """The policies of a checkpoint and of its server's configuration, each tried on the model before it is used."""

    def __init__(
        self,
        model: EludeModel,
        config: ServingConfig,
        stored: Mapping[str, Mapping[str, Any]],
        vectors: Mapping[str, StoredVector],
    ) -> None:
        """stored: the checkpoint's own, by name; the configuration's go before them. ConfigError for one that is not
        there, does not validate, or was made for another partition."""
        self.off = config.policies_off
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.rules: dict[str, Rule] = {}
        documents: dict[str, Mapping[str, Any] | Policy] = {**stored, **config.policies}
        for name, document in documents.items():
            mode: Mode = "default" if name in config.default_policies else "on request"
            mode = "shadow" if name in config.shadow_policies else mode
            mode = "off" if self.off else mode
            try:
                policy = document if isinstance(document, Policy) else validated_policy(name, document)
                self.rules[name] = Rule(
                    name, policy, digest(policy, vectors), _tried(model, name, policy, vectors), mode, since
                )
            except ConfigError as error:
                if not self.off:
                    raise
                audit.warning("%s It is off, like all policies.", error)
        in_force = () if self.off else (*config.default_policies, *config.shadow_policies)
        for name in in_force:
            if name not in self.rules:
                raise ConfigError(
                    f"The configuration puts the policy {name!r} in force, and there is none of that name; there are "
                    f"{', '.join(self.rules) or 'none'}."
                )
        self.defaults = [rule for rule in map(self.rules.get, config.default_policies) if rule and not self.off]
        self.shadows = [rule for rule in map(self.rules.get, config.shadow_policies) if rule and not self.off]
        _fit_together(model, self.defaults, "default_policies")
        _fit_together(model, self.shadows, "shadow_policies")
        for rule in (*self.defaults, *self.shadows):
            audit.info("policy %s sha256 %s in force (%s) since %s", rule.name, rule.sha256, rule.mode, rule.since)
        if self.off and (config.default_policies or config.shadow_policies):
            audit.info("all policies are off since %s", since)

    def named(self, names: list[str]) -> list[Rule]:
        """The policies in force for a request that names these: the operator's defaults first, each once. Problem for
        a name that is none, unless all are off: then clients go on as they are, and get the default answer."""
        if self.off:
            return []
        found = {rule.name: rule for rule in self.defaults}
        for number, name in enumerate(names):
            if name not in self.rules:
                raise Problem(
                    "unknown-policy",
                    f"There is no policy {name!r}; `describe` lists those there are.",
                    at(["steer", "policies", number], "unknown policy", closest(name, self.rules)),
                )
            found[name] = self.rules[name]
        return list(found.values())

    @staticmethod
    def record(identity: str, rules: list[Rule]) -> None:
        """An audit line for an answer that policies were in force for. identity is of safe characters."""
        for rule in rules:
            audit.info(
                "answer %s under policy %s sha256 %s (%s) since %s",
                identity, rule.name, rule.sha256, rule.mode, rule.since,
            )  # fmt: skip


def validated_policy(name: str, document: Mapping[str, Any]) -> Policy:
    """The policy that a document is. ConfigError for one that is none."""
    try:
        return Policy.model_validate(dict(document))
    except ValidationError as error:
        problem = invalid_document(error, document)
        raise ConfigError(f"The policy {name!r} cannot be used ({problem.detail[:-1]}); set it again.") from error


def digest(policy: Policy, vectors: Mapping[str, StoredVector]) -> str:
    """What audit lines name: SHA-256 over what the policy says and what the vectors are that it names."""
    return policy_sha256(policy.model_dump(mode="json", exclude_unset=True), vectors)


def _fit_together(model: EludeModel, rules: Sequence[Rule], key: str) -> None:
    """Policies in force together are planned together once, so that no request meets their clash."""
    try:
        plan(model, [rule.steering for rule in rules])
    except Problem as problem:
        raise ConfigError(f"The policies of `{key}` cannot be in force together: {problem.detail}") from problem


def _tried(model: EludeModel, name: str, policy: Policy, vectors: Mapping[str, StoredVector]) -> Steering:
    """The policy's steering, planned once on the model so that no request meets its mistakes."""
    served = model.manifest.partition_sha256
    if policy.partition_sha256 != served:
        raise ConfigError(
            f"The policy {name!r} was made for partition {policy.partition_sha256[:12]}…, the checkpoint served has "
            f"{served[:12]}…; its features mean something else here, so make the policy again for this checkpoint."
        )
    try:
        steering = steering_of(policy, vectors, policy.when)
        plan(model, [steering])
    except Problem as problem:
        raise ConfigError(f"The policy {name!r} cannot be used: {problem.detail}") from problem
    return steering
