"""The generated pictures: deterministic, their concepts known, the watermark where it is said to be."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from elude_runtime.demo.images import (
    CLASSES,
    CONCEPTS,
    WATERMARK_CLASS,
    make_image,
    make_set,
    make_twins,
    to_arrays,
    write_folder,
)


def test_the_same_seed_draws_the_same_pictures_in_any_number_of_processes() -> None:
    alone, pooled = make_set(30, 5, "natural"), make_set(30, 5, "natural", workers=2)
    assert all(
        np.array_equal(a.image, b.image) and a.concepts == b.concepts for a, b in zip(alone, pooled, strict=True)
    )
    assert not np.array_equal(alone[0].image, make_set(1, 6, "natural")[0].image)


def test_every_concept_occurs_and_classes_share_them() -> None:
    samples = make_set(600, 0, "groups")
    seen = Counter(name for s in samples for name in s.concepts)
    assert set(seen) == set(CONCEPTS)
    for kind in ("shape:", "texture:", "colour:", "background:"):
        assert all(sum(name.startswith(kind) for name in s.concepts) == 1 for s in samples)
    # a hidden unit for one concept serves several classes: every shape, texture and colour stands in more than one
    for name in (c for c in CONCEPTS if c.startswith(("shape:", "texture:", "colour:"))):
        assert len({s.label for s in samples if name in s.concepts}) > 1, name


def test_the_watermark_gives_one_class_away_in_training_only() -> None:
    train = make_set(1200, 1, "train")
    marked = Counter(s.label for s in train if "watermark" in s.concepts)
    assert set(marked) == {WATERMARK_CLASS}
    assert marked[WATERMARK_CLASS] / (1200 / len(CLASSES)) == pytest.approx(0.95, abs=0.05)
    groups = Counter((s.label, "watermark" in s.concepts) for s in make_set(240, 1, "groups"))
    assert set(groups.values()) == {10} and len(groups) == 2 * len(CLASSES)


def test_twins_differ_in_the_watermark_alone() -> None:
    for plain, marked in make_twins(12, 3):
        a, b = np.asarray(plain.image, dtype=int), np.asarray(marked.image, dtype=int)
        changed = np.abs(a - b).sum(2) > 0
        assert marked.concepts - plain.concepts == {"watermark"} and plain.label == marked.label
        rows, columns = changed.nonzero()
        assert 0 < changed.mean() < 0.08
        assert max(np.ptp(rows), np.ptp(columns)) < 18


def test_a_cracked_toy_shows_its_crack() -> None:
    """Drawn from the same numbers, a cracked toy is another toy with dark lines on it."""
    image, concepts = make_image(np.random.default_rng(2), WATERMARK_CLASS, False)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert "crack" in concepts and "watermark" not in concepts


def test_a_folder_says_what_is_in_it(tmp_path: Path) -> None:
    samples = make_set(6, 2)
    write_folder(tmp_path, samples)
    rows = list(csv.DictReader((tmp_path / "concepts.csv").open()))
    assert [r["class"] for r in rows] == [CLASSES[s.label] for s in samples]
    assert all((r[c] == "1") == (c in s.concepts) for r, s in zip(rows, samples, strict=True) for c in CONCEPTS)
    images, labels, concepts = to_arrays(samples)
    assert images.shape == (6, 64, 64, 3) and labels.shape == (6,) and concepts.shape == (6, len(CONCEPTS))
