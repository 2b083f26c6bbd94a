"""People's labels: what may be one, the file they lie in, and what they do to the feature table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Rewritten
from hypothesis import given
from hypothesis import strategies as st
from support import SECOND

from elude_runtime.checkpoint.catalogue import read_catalogue
from elude_runtime.checkpoint.labels import checked_label, read_labels, stored_labels, write_labels
from elude_runtime.errors import CheckpointError, EludeError, FeatureError, SettingsError
from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue
from elude_runtime.offline.feature_table import labelled, read_table, replace_table
from elude_runtime.offline.labelling import set_labels, set_labels_of

FEATURE, OTHER = f"{SECOND}/P0", f"{SECOND}/3/p1"


@pytest.fixture
def checkpoint(catalogued: Path, tmp_path: Path) -> Path:
    """With an automatic label for the first concept."""
    out = tmp_path / "ckpt"
    shutil.copytree(catalogued, out)
    table = read_table(out)
    automatic = ["bee ↔ gnu" if name == FEATURE else None for name in table["feature"].to_pylist()]
    place = table.column_names.index("automatic_label")
    replace_table(out, labelled(table.set_column(place, "automatic_label", [automatic]), {}))
    return out


def shown(checkpoint: Path, feature: str = FEATURE) -> tuple[str | None, str | None]:
    facts = read_catalogue(checkpoint).facts(feature)
    assert facts is not None
    return facts.label, facts.label_source


def test_a_label_of_people_wins_until_it_is_taken_away(checkpoint: Path) -> None:
    assert shown(checkpoint) == ("bee ↔ gnu", "automatic") and shown(checkpoint, OTHER) == (None, None)
    assert set_labels(checkpoint, {FEATURE: " stripes ", OTHER: "fur"}) == {FEATURE: "stripes", OTHER: "fur"}
    assert shown(checkpoint) == ("stripes", "user") and shown(checkpoint, OTHER) == ("fur", "user")
    assert (checkpoint / "labels.csv").read_text() == f"feature,label\n{FEATURE},stripes\n{OTHER},fur\n"
    assert set_labels(checkpoint, {FEATURE: None}) == {FEATURE: "bee ↔ gnu"}
    assert shown(checkpoint) == ("bee ↔ gnu", "automatic") and shown(checkpoint, OTHER) == ("fur", "user")
    with pytest.raises(SettingsError, match=f"Nobody gave {FEATURE} a label"):
        set_labels(checkpoint, {FEATURE: None})


def test_labels_survive_a_new_catalogue(checkpoint: Path, pictures: Path) -> None:
    set_labels(checkpoint, {FEATURE: "stripes"})
    result = make_catalogue(checkpoint, pictures, CatalogueOptions(effect_images=0, seed=3))
    assert shown(checkpoint) == ("stripes", "user") and result.labels["user"] == 1


def test_labels_before_any_catalogue(vit: Rewritten, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    set_labels(out, {FEATURE: "stripes"})
    assert shown(out) == ("stripes", "user")


def test_a_table_of_an_older_version(vit: Rewritten, tmp_path: Path) -> None:
    """Without the columns of a catalogue."""
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    table = read_table(out).drop_columns(["automatic_label", "stability", "raises", "lowers"])
    pq.write_table(table, out / "features.parquet")
    assert read_table(out)["raises"].null_count == len(table)
    set_labels(out, {FEATURE: "stripes"})
    assert shown(out) == ("stripes", "user")


def test_an_unknown_feature_changes_nothing(checkpoint: Path) -> None:
    with pytest.raises(FeatureError, match=rf"no feature '{SECOND}/P00'. Did you mean {FEATURE}"):
        set_labels(checkpoint, {OTHER: "fur", f"{SECOND}/P00": "x"})
    assert shown(checkpoint, OTHER) == (None, None) and not (checkpoint / "labels.csv").exists()


@pytest.mark.parametrize("text", ["<b>bold</b>", '"quoted", with a comma', "Ünïcode 🐝", "=1+1", "[red]", "x" * 200])
def test_any_line_of_text_is_a_label(checkpoint: Path, text: str) -> None:
    set_labels(checkpoint, {FEATURE: text})
    assert stored_labels(checkpoint) == {FEATURE: text} and shown(checkpoint) == (text, "user")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"), ("  ", "is empty"), ("x" * 201, "has 201 characters, the limit is 200"),
        ("a\nb", r"control character U\+000A"), ("a\x1b[31m", r"U\+001B"), ("a\0", r"U\+0000"),
        ("a\u2028b", r"U\+2028"), ("\u202eabc", r"U\+202E"), ("\ud800", r"U\+D800"),
    ],
)  # fmt: skip
def test_what_is_no_label(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        checked_label(text)


@given(st.dictionaries(st.text(min_size=1).filter(lambda t: t.isprintable()), st.text(), max_size=5))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, labels: dict[str, str]) -> None:
    kept = {}
    for feature, text in labels.items():
        try:
            kept[feature] = checked_label(text)
        except SettingsError:
            continue
    path = tmp_path_factory.getbasetemp() / "hypothesis.csv"
    write_labels(path, kept)
    assert read_labels(path) == kept


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"name,label\na,b\n", CheckpointError, "needs the columns feature and label"),
        (b"", CheckpointError, "needs the columns feature and label"),
        ("feature,label\nä,b\n".encode("latin-1"), CheckpointError, "needs the columns feature and label"),
        (b'feature,label\n%s,"open\n' % FEATURE.encode(), CheckpointError, "cannot be read"),
        (b"feature,label\n%s,a\n\nnothing,b\n" % FEATURE.encode(), FeatureError, "line 4: there is no feature 'not"),
        (b"feature,label\n%s,a\n%s,b\n" % (FEATURE.encode(), FEATURE.encode()), SettingsError, "line 3: .* already"),
        (b"feature,label\n%s,%s\n" % (FEATURE.encode(), b"x" * 300), SettingsError, "line 2: The label has 300"),
        (b'feature,label\n%s,"a\nb"\n' % FEATURE.encode(), SettingsError, r"line 3: .*control character U\+000A"),
        (b"feature,label\n%s\n" % FEATURE.encode(), None, ""),
    ],
)  # fmt: skip
def test_files_of_labels(
    checkpoint: Path, tmp_path: Path, content: bytes, kind: type[EludeError] | None, message: str
) -> None:
    file = tmp_path / "given.csv"
    file.write_bytes(content)
    if kind is None:  # a row without a label says nothing
        assert set_labels_of(checkpoint, file) == {}
        return
    with pytest.raises(kind, match=message) as caught:
        set_labels_of(checkpoint, file)
    assert str(file) in str(caught.value) and not (checkpoint / "labels.csv").exists()


def test_a_file_of_labels_goes_over_those_there_are(checkpoint: Path, tmp_path: Path) -> None:
    set_labels(checkpoint, {FEATURE: "one", OTHER: "two"})
    file = tmp_path / "given.csv"
    file.write_bytes(f"\ufefflabel,feature,note\r\nthree,{FEATURE},as Excel writes it\r\n".encode())
    assert set_labels_of(checkpoint, file) == {FEATURE: "three"}
    assert stored_labels(checkpoint) == {FEATURE: "three", OTHER: "two"}


def test_a_file_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        set_labels_of(checkpoint, tmp_path / "nowhere.csv")
