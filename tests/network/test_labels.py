"""Class names that come with published weights, and when it is not certain what they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
from timm.data import ImageNetInfo

from elude_runtime.network.labels import _imagenet, labels_of


def labels(name: str, classes: int, **config: Any) -> list[str]:
    model = SimpleNamespace(num_classes=classes, pretrained_cfg={"num_classes": classes, **config})
    return labels_of(model, name)  # type: ignore[arg-type]


class TestOwnNames:
    def test_a_list(self) -> None:
        assert labels("hf-hub:a/b", 2, label_names=["x", "y"]) == ["x", "y"]
        assert labels("hf-hub:a/b", 2, label_names=("x", "y")) == ["x", "y"]

    def test_descriptions_take_the_place_of_names(self) -> None:
        found = labels("hf-hub:a/b", 3, label_names=["n1", "n2", "n3"], label_descriptions={"n1": "ant", "n3": "cat"})
        assert found == ["ant", "n2", "cat"]

    def test_numbered_names(self) -> None:
        assert labels("hf-hub:a/b", 2, label_names={"1": "y", "0": "x"}) == ["x", "y"]

    def test_the_same_description_twice(self) -> None:
        found = labels(
            "hf-hub:a/b", 3, label_names=["n1", "n2", "n3"], label_descriptions={"n1": "crane", "n2": "crane"}
        )
        assert found == ["crane (n1)", "crane (n2)", "n3"]

    def test_commas_stay(self) -> None:
        assert labels("hf-hub:a/b", 2, label_names=["red, round", "red, flat"]) == ["red, round", "red, flat"]

    @pytest.mark.parametrize(
        "names",
        [["x"], ["x", "y", "z"], {"0": "x", "2": "y"}, ["x", 3], ["x", ""], "xy", None, 7],
        ids=str,
    )
    def test_what_does_not_name_every_class(self, names: Any) -> None:
        assert labels("hf-hub:a/b", 2, label_names=names) == []

    def test_a_replaced_classifier_has_lost_them(self) -> None:
        model = SimpleNamespace(num_classes=2, pretrained_cfg={"num_classes": 3, "label_names": ["x", "y", "z"]})
        assert labels_of(model, "hf-hub:a/b") == []  # type: ignore[arg-type]


class TestImageNet:
    def test_timms_weights(self) -> None:
        found = labels("resnet18.a1_in1k", 1000, tag="a1_in1k")
        assert found[0] == "tench" and found[281] == "tabby" and len(set(found)) == 1000
        info = ImageNetInfo("imagenet-1k")
        assert all(info.index_to_description(i).startswith(name.split(" (")[0]) for i, name in enumerate(found))

    def test_two_classes_of_one_name_are_told_apart(self) -> None:
        found = labels("resnet18.a1_in1k", 1000, tag="a1_in1k")
        assert found[134] == "crane (n02012849)" and found[517] == "crane (n03126707)"

    @pytest.mark.parametrize(
        ("name", "classes", "tag"),
        [
            ("vit_base_patch16_224.augreg_in21k", 21843, "augreg_in21k"),
            ("convnext_base.fb_in22k", 21841, "fb_in22k"),
            ("convnext_base.clip_laion2b_augreg_ft_in12k_384", 11821, "clip_laion2b_augreg_ft_in12k_384"),
            ("mixer_b16_224.miil_in21k", 11221, "miil_in21k"),
            ("timm/resnet18.a1_in1k", 1000, None),
            ("hf-hub:timm/resnet18.a1_in1k@main", 1000, None),
            ("beit_base_patch16_224.in22k_ft_in22k_in1k", 1000, "in22k_ft_in22k_in1k"),
            ("resnet18", 1000, "a1_in1k"),
        ],
    )
    def test_tags_that_say_so(self, name: str, classes: int, tag: str | None) -> None:
        found = labels(name, classes, tag=tag)
        assert len(found) == len(set(found)) == classes

    @pytest.mark.parametrize(
        ("name", "classes", "tag"),
        [
            ("resmlp_12_224.fb_dino", 1000, "fb_dino"),
            ("resnet18.a1_in1k", 21841, "a1_in1k"),
            ("vit_base_patch16_224.augreg_in21k", 1000, "augreg_in21k"),
            ("hf-hub:somebody/flowers", 1000, "a1_in1k"),
            ("hf-hub:somebody/flowers.a1_in1k", 1000, "a1_in1k"),
            ("local-dir:/models/flowers", 1000, "a1_in1k"),
            ("local-dir:flowers", 1000, "a1_in1k"),
            ("resnet18.a1_in1k", 10, "a1_in1k"),
            ("vit_small_patch14_dinov2.lvd142m", 0, "lvd142m"),
        ],
    )
    def test_what_is_not_certain(self, name: str, classes: int, tag: str) -> None:
        """Somebody's fine-tuned model keeps the tag of the weights that it was made from."""
        assert labels(name, classes, tag=tag) == []

    def test_every_published_classifier_of_timm_is_told_by_its_tag(self) -> None:
        """A new timm with other tags would show here."""
        certain = doubtful = 0
        for name in timm.list_models(pretrained=True):
            config = timm.models.get_pretrained_cfg(name)
            if config and config.num_classes == 1000:
                subset = _imagenet(config.to_dict(), name)
                certain += subset == "imagenet-1k"
                doubtful += subset is None
        assert certain > 1000 and doubtful < 10
