"""Encoders: the same pixels at the same places, and none that is the evaluated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Rewritten
from safetensors.torch import save_file
from support import CONV_DATA, VIT_ARGS, VIT_DATA, tiny_mobilenet, tiny_vit
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.evaluation.embeddings import Embeddings
from elude_runtime.offline.evaluation.encoders import (
    EncoderChoice,
    EncoderError,
    PixelEncoder,
    TimmEncoder,
    refuse_evaluated,
)


def pixels(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


class TestTimm:
    def test_the_penultimate_features_of_the_pixels_given(self) -> None:
        model = tiny_mobilenet()
        images, grid = TimmEncoder("conv", model, CONV_DATA)(pixels(3))
        with torch.no_grad():
            features = model.forward_features((pixels(3) - 0.5) / 0.5)  # type: ignore[operator]
            torch.testing.assert_close(images, model.forward_head(features, pre_logits=True))  # type: ignore[operator]
        assert grid is not None and grid.shape == (3, features.shape[1], 2, 2)
        torch.testing.assert_close(grid, features)

    @pytest.mark.parametrize(("name", "args"), [("vit", {}), ("registers", {"reg_tokens": 2})])
    def test_prefix_tokens_are_no_places(self, name: str, args: dict[str, Any]) -> None:
        model = tiny_vit(**args)
        images, grid = TimmEncoder(name, model, VIT_DATA)(pixels(2, 32))
        with torch.no_grad():
            features = model.forward_features((pixels(2, 32) - 0.5) / 0.5)  # type: ignore[operator]
        assert grid is not None and images.shape == (2, 32) and grid.shape == (2, 32, 4, 4)
        torch.testing.assert_close(grid.flatten(2).mT, features[:, -16:])

    def test_channels_last(self) -> None:
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)  # fmt: skip  # noqa: E501
        images, grid = TimmEncoder("swin", model, CONV_DATA)(pixels(1))
        assert grid is not None and images.shape == (1, 16) and grid.shape == (1, 16, 8, 8)

    def test_another_size_is_resized(self) -> None:
        images, _ = TimmEncoder("conv", tiny_mobilenet(), CONV_DATA)(pixels(1, 32))
        assert torch.isfinite(images).all()

    def test_what_is_no_timm_model_is_refused(self) -> None:
        with pytest.raises(EncoderError, match="forward_features"):
            TimmEncoder("linear", nn.Sequential(nn.Linear(3, 2)), CONV_DATA)


class TestPixels:
    def test_colours_and_edges_tell(self) -> None:
        red = torch.zeros(1, 3, 56, 56)
        red[:, 0] = 0.9
        stripes = torch.zeros(1, 3, 56, 56)
        stripes[..., ::4] = 0.9
        images, grid = PixelEncoder()(torch.cat([red, red * 0.95, stripes, stripes.mT]))
        same = F.cosine_similarity(images[0], images[1], dim=0)
        other = [F.cosine_similarity(images[a], images[b], dim=0) for a, b in ((0, 2), (2, 3))]
        assert same > 0.95 and max(other) < 0.8
        assert grid.shape == (4, 72, 14, 14)

    def test_it_is_not_trained(self) -> None:
        assert torch.equal(PixelEncoder()(pixels(2))[0], PixelEncoder()(pixels(2))[0])


class TestRefused:
    def test_the_evaluated_model_under_any_name(self, vit: Rewritten) -> None:
        headless = tiny_vit()
        headless.reset_classifier(0)  # type: ignore[operator]
        for same in (tiny_vit(), headless):
            with pytest.raises(EncoderError, match=r"other name is the evaluated model itself .* another network\.$"):
                refuse_evaluated(TimmEncoder("other name", same, VIT_DATA), vit.model.base)

    def test_its_tensors_under_other_names(self, vit: Rewritten) -> None:
        class Renamed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = tiny_vit()

            def forward_features(self, x: Tensor) -> Tensor:
                return self.inner.forward_features(x)  # type: ignore[operator,no-any-return]

            def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
                return self.inner.forward_head(x, pre_logits=pre_logits)  # type: ignore[operator,no-any-return]

        with pytest.raises(EncoderError):
            refuse_evaluated(TimmEncoder("renamed", Renamed(), VIT_DATA), vit.model.base)

    def test_others_are_not(self, vit: Rewritten) -> None:
        torch.manual_seed(99)
        sister = timm.create_model("vit_tiny_patch16_224", **VIT_ARGS)  # the same architecture, trained by itself
        for other in (TimmEncoder("a", sister, VIT_DATA), TimmEncoder("b", tiny_mobilenet(), CONV_DATA)):
            refuse_evaluated(other, vit.model.base)
        refuse_evaluated(PixelEncoder(), vit.model.base)


class TestChoice:
    def test_weights_from_a_file(self, tmp_path: Path) -> None:
        model = timm.create_model("mobilenetv2_035", num_classes=5)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        encoder = EncoderChoice("mobilenetv2_035", tmp_path / "w.safetensors").build({"input_size": (3, 64, 64)})
        assert isinstance(encoder, TimmEncoder) and encoder.config.input_size == (3, 64, 64)
        assert encoder.hashes == TimmEncoder("x", model, DataConfig.of_model(model)).hashes

    def test_a_factory(self, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text("import timm\n\ndef build():\n    return timm.create_model('mobilenetv2_035', num_classes=3)\n")
        encoder = EncoderChoice(factory=f"{file}:build").build()
        assert encoder.name == "build"
        assert encoder(pixels(1))[0].shape == (1, 1280)

    def test_pixels_and_nothing(self) -> None:
        assert isinstance(EncoderChoice("pixels").build(), PixelEncoder)
        with pytest.raises(ModelError, match="--encoder"):
            EncoderChoice().build()


class TestEmbeddings:
    @pytest.mark.parametrize(("own", "grid"), [((2, 2), (4, 4)), ((4, 4), (4, 4)), ((7, 5), (3, 4))])
    def test_places_are_read_at_the_tokens_centres(
        self, tmp_path: Path, own: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        images, places = torch.randn(6, 5), torch.randn(6, 8, *own)
        embeddings = Embeddings("e", 6, tmp_path)
        embeddings.add(images[:4], places[:4])
        embeddings.add(images[4:], places[4:])
        centred = images - images.mean(0)
        torch.testing.assert_close(embeddings.image_vectors(), centred / centred.norm(dim=1, keepdim=True))
        read = F.interpolate(places, size=grid, mode="bilinear", align_corners=False).flatten(2).mT  # [6, T, 8]
        expected = F.normalize(read - read.mean(0), dim=-1)
        vectors = embeddings.on(grid)
        assert vectors is not None and vectors.tokens == grid[0] * grid[1]
        every = torch.arange(6)[:, None].expand(-1, vectors.tokens), torch.arange(vectors.tokens).expand(6, -1)
        torch.testing.assert_close(vectors(*every), expected)

    def test_no_places(self, tmp_path: Path) -> None:
        embeddings = Embeddings("e", 2, tmp_path)
        embeddings.add(torch.randn(2, 5), None)
        assert embeddings.on((2, 2)) is None
        other = Embeddings("f", 2, tmp_path)
        other.add(torch.randn(2, 5), torch.randn(2, 5, 2, 2))
        assert other.on(None) is None

    def test_a_planted_spot_is_found_where_it_lies(self, tmp_path: Path) -> None:
        """The encoder is given the evaluated model's own pixels: a spot in its third row and column stands there."""
        shown = torch.rand(5, 3, 56, 56, generator=torch.Generator().manual_seed(1)) * 0.3
        shown[0, 0, 28:42, 28:42] = 1.0
        embeddings = Embeddings("pixels", 5, tmp_path)
        embeddings.add(*PixelEncoder()(shown))
        vectors = embeddings.on((4, 4))
        assert vectors is not None
        own = vectors(torch.zeros(16, dtype=torch.int64), torch.arange(16))
        norms = [float((own[i] @ own[10]).abs()) for i in range(16) if i != 10]
        assert max(norms) < 0.9
