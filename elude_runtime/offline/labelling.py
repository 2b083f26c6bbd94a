"""`elude label`: people's labels into `labels.csv` and the feature table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elude_runtime.checkpoint.labels import LABELS, checked_label, read_labels, stored_labels, write_labels
from elude_runtime.errors import FeatureError, SettingsError, did_you_mean
from elude_runtime.offline.feature_table import labelled, read_table, replace_table


def set_labels(checkpoint: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    """Give features labels, or take them away (None): then the automatic one shows again. The labels of these features
    afterwards, of whichever source. FeatureError for a feature that is not there, SettingsError for an impossible text
    or nothing to take away; nothing is changed then."""
    table = read_table(checkpoint)
    known = set(table["feature"].to_pylist())
    stored = stored_labels(checkpoint, known)
    for feature, text in changes.items():
        if feature not in known:
            raise FeatureError(f"The checkpoint has no feature {feature[:80]!r}.{did_you_mean(feature, known)}")
        if text is not None:
            stored[feature] = checked_label(text)
        elif feature in stored:
            del stored[feature]
        else:
            raise SettingsError(f"Nobody gave {feature} a label, so there is none to take away.")
    write_labels(checkpoint / LABELS, stored)
    table = labelled(table, stored)
    replace_table(checkpoint, table)
    texts = dict(zip(table["feature"].to_pylist(), table["label"].to_pylist(), strict=True))
    return {feature: texts[feature] for feature in changes}


def set_labels_of(checkpoint: Path, file: Path) -> dict[str, str]:
    """The labels of a CSV file with the columns feature and label, over those that are there. Errors name its line."""
    known = set(read_table(checkpoint)["feature"].to_pylist())
    return set_labels(checkpoint, read_labels(file, known))
