"""Which classes an end is named after: those that the model finds in all of its images, and none by chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.automatic_labels import LONGEST, StandingOut, label_texts
from elude_runtime.offline.catalogue.best_images import NOWHERE
from elude_runtime.offline.catalogue.draws import Draws

IMAGES, CLASSES = 400, 100
NAMES = [f"class {number}" for number in range(CLASSES)]


def answers_of(logits: Tensor) -> Answers:
    answers = Answers()
    for places in torch.arange(len(logits)).split(64):
        answers.add(places, bytes(16 * len(places)), logits[places], Draws(0).of(places, 1)[0])
    return answers


def shown_classes(places: Tensor, answers: Answers, classes: list[str]) -> Tensor:
    return StandingOut(answers, classes).shown(places)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))


def test_classes_that_all_images_of_an_end_speak_for(logits: Tensor) -> None:
    logits[:9, 7] += 2.5  # never the first answer of an image by itself
    logits[:9, 8] += 3.5
    shown = shown_classes(torch.arange(9)[:, None], answers_of(logits), NAMES)
    assert shown.tolist() == [[8, 7, -1]]


def test_one_sure_image_speaks_for_nothing(logits: Tensor) -> None:
    logits[0, 7] += 8
    assert shown_classes(torch.arange(9)[:, None], answers_of(logits), NAMES).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("tails", ["light", "heavy"])
def test_ends_of_random_images_are_seldom_named(logits: Tensor, tails: str) -> None:
    logits = logits if tails == "light" else logits.exp().square()
    g = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(IMAGES, generator=g)[:9] for _ in range(4000)], 1)
    named = (shown_classes(places, answers_of(logits), NAMES)[:, 0] >= 0).float().mean()
    assert 0.003 < named < 0.03  # one in a hundred


def test_few_images_speak_for_nothing(logits: Tensor) -> None:
    logits[:2, 7] += 50
    places = torch.tensor([0, 1, *[NOWHERE] * 7])[:, None]
    assert shown_classes(places, answers_of(logits), NAMES).tolist() == [[-1, -1, -1]]
    three = torch.arange(3)[:, None]
    few = logits[:20].clone()
    few[:3, 7] += 50
    assert shown_classes(three, answers_of(few), NAMES)[0, 0] == 7
    assert (shown_classes(three, answers_of(few[:19]), NAMES) == -1).all()


def test_a_class_that_never_changes_names_nothing() -> None:
    shown = shown_classes(torch.arange(9)[:, None], answers_of(torch.zeros(40, 3)), ["a", "b", "c"])
    assert (shown == -1).all()


def test_without_names_or_classes_there_is_nothing_to_say(logits: Tensor) -> None:
    places = torch.arange(9)[:, None]
    assert (shown_classes(places, answers_of(logits), []) == -1).all()
    assert (shown_classes(places, answers_of(torch.zeros(40, 0)), []) == -1).all()


def test_the_text_keeps_within_its_length() -> None:
    names = ["great white shark, white shark, man-eater", "x" * 40, "tiger shark", "y" * 90]
    positive = torch.tensor([[0, 2, -1], [-1, -1, -1], [0, 1, 2], [3, -1, -1]])
    negative = torch.tensor([[-1, -1, -1], [0, -1, -1], [2, -1, -1], [-1, -1, -1]])
    found = label_texts(positive, negative, names)
    assert found[:2] == ["great white shark, tiger shark", "↔ great white shark"]
    assert found[2] == "great white shark ↔ tiger shark"
    assert len(found[3]) == LONGEST
