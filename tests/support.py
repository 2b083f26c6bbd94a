"""What several tests build on: tiny models, generated images, random partitions, tampered checkpoints."""

from __future__ import annotations

import copy
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.checkpoint.manifest import AttributionEntry, LayerEntry, Manifest, TokenTypeEntry
from elude_runtime.checkpoint.storage import tensors_sha256
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import REST_CONCEPT, REST_EDGE, Partition
from elude_runtime.partition.sign_split import compact

needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
CLASSES = 7
LABELS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
VIT = "vit_tiny_patch16_224"
VIT_ARGS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": CLASSES,
}  # fmt: skip
VIT_DATA = DataConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
CONV_DATA = DataConfig((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875, "center")
FIRST, SECOND = "blocks.0.attn.proj", "blocks.1.mlp.fc2"  # the split layers of the tiny ViT's checkpoint


def tiny_vit(**changes: Any) -> nn.Module:
    """A random ViT whose weights are large enough for its blocks to matter and to be far from linear."""
    torch.manual_seed(5)
    model = timm.create_model(VIT, **{**VIT_ARGS, **changes})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1.2 / module.in_features**0.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def tiny_mobilenet() -> nn.Module:
    torch.manual_seed(6)
    model = timm.create_model("mobilenetv2_035", num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh running statistics would let the signal die out
            module.running_var.fill_(0.3)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random colour picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number).save(folder / f"{number:03}.png")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def input_tensor(config: DataConfig, count: int, first: int = 100) -> Tensor:
    """Preprocessed pictures [count, 3, H, W]."""
    transform = config.transform()
    return torch.stack([transform(picture(first + i)) for i in range(count)])


def tamper(
    checkpoint: Path,
    out: Path,
    tensors: Callable[[dict[str, Tensor]], None] | None = None,
    manifest: Callable[[dict[str, Any]], None] | None = None,
    *,
    seal: bool = True,
) -> Path:
    """A copy of a checkpoint with changed tensors or manifest. seal: with digests that fit the change, so that the
    fault has to be found for what it is."""
    shutil.copytree(checkpoint, out)
    values = json.loads((out / "elude.json").read_text())
    stored = load_file(out / "model.safetensors")
    if tensors:
        tensors(stored)
        save_file({n: t.contiguous() for n, t in stored.items()}, out / "model.safetensors", metadata={"format": "pt"})
    if manifest:
        manifest(values)
    if seal:
        own = {n: t for n, t in stored.items() if n.startswith("elude.") and n != "elude.calibration_images"}
        values["base_sha256"] = tensors_sha256({n: t for n, t in stored.items() if not n.startswith("elude.")})
        values["partition_sha256"] = tensors_sha256(own)
    (out / "elude.json").write_text(json.dumps(values))
    return out


def random_partition(
    seed: int,
    neurons: int,
    inputs: int,
    types: int = 1,
    subunits: int = 4,
    concepts: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Partition:
    """A well-formed partition without any sense: some edges in `rest`, some sub-units dead, some in no concept."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, subunits + 1, (types, neurons, inputs), generator=g)
    raw = torch.where(raw == subunits, REST_EDGE, raw).to(torch.uint8)
    made = [compact(e, subunits) for e in raw]
    edges, counts = torch.stack([e for e, _ in made]), torch.stack([c for _, c in made])
    shape = (types, neurons, subunits + 1)
    exists = torch.arange(subunits + 1) < counts.long()[..., None]
    exists[..., -1] = (edges == REST_EDGE).any(-1)
    mean = torch.randn(shape, generator=g, dtype=dtype) * exists
    std = (torch.rand(shape, generator=g, dtype=dtype) + 0.5) * (torch.rand(shape, generator=g) > 0.15) * exists
    concept = torch.full(shape, REST_CONCEPT, dtype=torch.int32)
    for t in range(types):
        chosen = exists[t].clone()
        chosen[:, -1] = False
        drawn = torch.randint(0, concepts + 1, (int(chosen.sum()),), generator=g)
        used = [c for c in range(concepts) if (drawn == c).any()]
        number = {c: i for i, c in enumerate(used)}
        concept[t][chosen] = torch.tensor([number.get(int(c), REST_CONCEPT) for c in drawn], dtype=torch.int32)
    sign = torch.where(torch.rand(shape, generator=g) > 0.3, 1, -1).to(torch.int8)
    return Partition(edges, counts, mean, std, concept, sign)


def state_of(module: nn.Module, layout: TokenLayout, partition: Partition, name: str = "layer") -> SplitState:
    """A split layer outside any checkpoint."""
    conv = isinstance(module, nn.Conv2d)
    entry = LayerEntry(
        name=name,
        kind="conv" if conv else "linear",
        neurons=module.weight.shape[0],
        inputs=module.weight.shape[1],
        kernel=list(module.kernel_size) if conv else [],
        groups=module.groups if conv else 1,
        subunits=partition.subunits,
        total=layout.total,
        prefix=layout.prefix,
        grid=list(layout.grid) if layout.grid else None,
        token_types=[
            TokenTypeEntry(name=("patches", "cls")[t], live=True, concepts=partition.concepts(t), tokens=1)  # type: ignore[arg-type]
            for t in range(layout.types)
        ],
        follows="added to the stream",
        attribution=AttributionEntry(auto="gradient", completeness={}, images=0),
    )
    return SplitState(entry, module, partition)


def as_tokens(y: Tensor, conv: bool) -> Tensor:
    """A layer's output as [B, T, d], written apart from the package's own."""
    if conv:
        return y.reshape(y.shape[0], y.shape[1], -1).transpose(1, 2)
    return y.reshape(y.shape[0], -1, y.shape[-1])


def naive_sums(module: nn.Module, layout: TokenLayout, partition: Partition, x: Tensor) -> Tensor:
    """Sub-unit sums [B, T, d, M + 1]: the layer itself, run once a sub-unit with every other edge set to zero."""
    parts: list[Tensor] = [torch.empty(0)] * layout.total
    for token_type in range(partition.types):
        tokens = range(layout.prefix) if token_type else range(layout.prefix, layout.total)
        columns = []
        for slot in range(partition.subunits + 1):
            wanted = REST_EDGE if slot == partition.subunits else slot
            mask = (partition.edges[token_type] == wanted).to(module.weight.dtype)
            one = copy.deepcopy(module)
            with torch.no_grad():
                one.weight.mul_(mask.reshape(*mask.shape, *[1] * (one.weight.dim() - 2)))
                if one.bias is not None:
                    one.bias.zero_()
                columns.append(as_tokens(one(x), isinstance(module, nn.Conv2d)))
        sums = torch.stack(columns, -1)
        for token in tokens:
            parts[token] = sums[:, token]
    return torch.stack(parts, 1)


def forward_with(model: nn.Module, x: Tensor, changes: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Tensor:
    """A full forward pass in which named layers return change(input, output) instead of their output."""
    modules = dict(model.named_modules())
    hooks = [
        modules[n].register_forward_hook(lambda _, args, out, change=change: change(args[0], out))
        for n, change in changes.items()
    ]
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def manifest_of(checkpoint: Path) -> Manifest:
    return Manifest.model_validate_json((checkpoint / "elude.json").read_text())


@dataclass(frozen=True)
class Ran:
    """What a command left behind: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


def refused(ran: Ran, *said: str) -> None:
    """Exit code 2 and one sentence on standard error that says what to do."""
    assert ran.code == 2, ran
    assert "Traceback" not in ran.err and ran.out == ""
    message = ran.err.strip().splitlines()[-1]
    assert message.startswith("elude: ") and message.endswith((".", "?", "…")), ran.err
    for part in said:
        assert part in message, message


class TorchEncoder(nn.Module):
    """A small ViT of PyTorch's own encoder layers."""

    def __init__(self, norm_first: bool = False, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.patches = nn.Linear(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.head(self.encoder(self.patches(tokens)).mean(1))
