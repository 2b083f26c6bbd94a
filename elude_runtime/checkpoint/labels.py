"""`labels.csv`: what people call features. They come before automatic labels, and no new catalogue takes them away."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from elude_runtime.checkpoint.storage import write_file
from elude_runtime.errors import CheckpointError, FeatureError, SettingsError, did_you_mean

LABELS = "labels.csv"
COLUMNS = ["feature", "label"]
LONGEST = 200  # characters
AUTOMATIC, USER = "automatic", "user"  # sources
_LARGEST = 50_000_000  # bytes of a file
# of Unicode: control characters, halves of surrogate pairs, line and paragraph separators
_REFUSED = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn the direction of what follows


def checked_label(text: str) -> str:
    """The label without spaces around it. Any text is one, also HTML: what shows it escapes it. SettingsError for one
    that is empty, too long or holds characters that are no text."""
    label = text.strip(" ")
    if not label:
        raise SettingsError("The label is empty; give a text, or --clear to take a label away.")
    if len(label) > LONGEST:
        raise SettingsError(f"The label has {len(label)} characters, the limit is {LONGEST}; shorten it.")
    for character in label:
        if unicodedata.category(character) in _REFUSED or character in _TURNING:
            raise SettingsError(
                f"The label {label[:40]!r} holds the control character U+{ord(character):04X}; write it in one line of "
                "plain text."
            )
    return label


def read_labels(path: Path, known: Collection[str] | None = None) -> dict[str, str]:
    """{feature: label} of a CSV file with the columns feature and label; rows without a label are left out.

    known: the features that there are; None for whatever the file names. CheckpointError for a file that cannot be
    read, SettingsError or FeatureError with the line for a row that does not fit.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large for a list of labels")
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError("its first line does not name them")
        rows = [(reader.line_num, row["feature"] or "", row["label"]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{path} cannot be read ({reason}); it needs the columns feature and label.") from error
    found: dict[str, str] = {}
    for line, feature, label in rows:
        if not label:
            continue
        where = f"{path}, line {line}: "
        if known is not None and feature not in known:
            raise FeatureError(f"{where}there is no feature {feature[:80]!r}.{did_you_mean(feature, known)}")
        if feature in found:
            raise SettingsError(f"{where}{feature} has a label already; keep one of the two.")
        try:
            found[feature] = checked_label(label)
        except SettingsError as error:
            raise SettingsError(f"{where}{error}") from error
    return found


def stored_labels(checkpoint: Path, known: Collection[str] | None = None) -> dict[str, str]:
    """The labels beside a checkpoint, as `read_labels` reads them; none where there is no file."""
    path = checkpoint / LABELS
    return read_labels(path, known) if path.exists() else {}


def write_labels(path: Path, labels: Mapping[str, str]) -> None:
    """Write the file whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(labels.items())
    write_file(path, text.getvalue().encode())
