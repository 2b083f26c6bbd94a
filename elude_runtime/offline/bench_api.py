"""What explaining and steering cost beside a plain prediction: single images, in process, measured alternately.

Everything is compared with a plain prediction that ran right before or after it. t is the tail's share of a forward
pass: from the split layer's output to the end, read off the clock in plain passes, so that no overhead of re-running
tails counts into it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elude_runtime.analysis.edits import Edit
from elude_runtime.analysis.model import EludeModel
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.errors import EludeError
from elude_runtime.network.preprocessing import SERVED_FORMATS, decode_image, to_input
from elude_runtime.offline.bench import Ratio, environment
from elude_runtime.offline.image_files import Progress
from elude_runtime.offline.images import ImageSource

TOP, NODES, CAPTUM_STEPS = 10, 4, 50
_MULTIPART = "multipart/form-data"
Call = Callable[[int], Any]  # takes the number of the image


@dataclass(frozen=True)
class Kind:
    """A kind of request about one layer. explain: its options, None for steering (the top concept ablated); allowed:
    (a, b) of the bound 1 + a t + b, in plain predictions."""

    name: str
    explain: dict[str, Any] | None
    allowed: tuple[float, float]

    def bound(self, share: float) -> float:
        return 1 + self.allowed[0] * share + self.allowed[1]

    def document(self, layer: str, top: str) -> dict[str, Any]:
        """The request document. top: the concept to ablate."""
        if self.explain is None:
            return {"steer": {"edits": [{"feature": top, "mode": "ablate"}]}}
        return {"explain": {"layers": [layer], "top_features": TOP, **self.explain}}

    def of_model(self, model: EludeModel, x: Tensor, layer: str, top: str) -> Any:
        """The same from the model itself, a preprocessed image [1, 3, H, W]."""
        if self.explain is None:
            return model.steer(x, [Edit(top)])
        return model.explain(x, layers=[layer], top_features=TOP, **self.explain)


_NODES = {"method": "integrated_gradients", "steps": NODES}
KINDS = (
    Kind("gradient, concepts", {"method": "gradient", "level": "concepts"}, (4, 0.1)),
    Kind("gradient, sub-units", {"method": "gradient", "level": "subunits"}, (4, 0.1)),
    Kind(f"integrated gradients, {NODES} nodes, concepts", {**_NODES, "level": "concepts"}, (14, 0.1)),
    Kind(f"integrated gradients, {NODES} nodes, sub-units", {**_NODES, "level": "subunits"}, (14, 0.1)),
    Kind("default and steered", None, (1.2, 0.05)),
)


@dataclass(frozen=True)
class Sample:
    """One image: encoded, and as the model's input [1, 3, H, W]."""

    encoded: bytes
    x: Tensor


class Workbench:
    """An engine with the images that it is asked about."""

    def __init__(
        self,
        checkpoint: Path,
        images: str | Path,
        count: int,
        *,
        threads: int | None = None,
        device: str = "cpu",
        trust_factory: bool = False,
    ) -> None:
        """EludeError for a checkpoint, images or a device that cannot be used."""
        config = ServingConfig.model_validate({"threads": threads, "trust_factory": trust_factory, "device": device})
        self.engine = Engine.open(checkpoint, config, name="bench", version="1")
        self.model = self.engine.model
        if self.model.manifest.output != "logits":
            raise EludeError("The model has no classes to explain; give `elude bench api` one with a head.")
        parameter = next(self.model.base.parameters())
        transform = self.model.data_config.transform()
        found = []
        for encoded in ImageSource(images, self.model.data_config).encoded(count):
            x = to_input(decode_image(encoded, formats=SERVED_FORMATS), transform)
            found.append(Sample(encoded, x[None].to(parameter.device, parameter.dtype)))
        if not found:
            raise EludeError(f"None of the images in {images} can be read; give JPEG, PNG or WebP files.")
        self.samples = found

    def sample(self, number: int) -> Sample:
        return self.samples[number % len(self.samples)]

    def predict(self, number: int) -> Tensor:
        """The model's output for one preprocessed image."""
        with torch.no_grad():
            return self.model(self.sample(number).x)

    def request(self, documents: list[dict[str, Any]] | None = None) -> Call:
        """Asks the engine about an image: a document for each, None for a plain prediction from the raw bytes."""
        rows = []
        for number, sample in enumerate(self.samples):
            if documents is None:
                rows.append(Row({"body": sample.encoded}, "image/jpeg", False, "", "bench"))
            else:
                parts = {"image": sample.encoded, "request": json.dumps(documents[number]).encode()}
                rows.append(Row(parts, _MULTIPART, False, "", "bench"))

        def ask(number: int) -> str:
            (answered,) = self.engine.answer([rows[number % len(rows)]])
            if answered.status != 200:
                raise EludeError(f"The engine answered {answered.status} where figures were wanted: {answered.body}")
            return answered.body

        return ask

    def top_concepts(self, layer: str) -> list[str]:
        """Of every image the concept with the largest gradient attribution."""
        found = []
        for sample in self.samples:
            ((explanation,),) = self.model.explain(sample.x, layers=[layer], method="gradient", top_features=1)
            listed = explanation.layers[0].features
            # where no concept has any, the layer's first costs the same
            found.append(listed[0].feature.name if listed else self.model.concept_names(layer)[0])
        return found


def measure_api(
    bench: Workbench,
    layers: list[str] | None = None,
    *,
    pairs: int = 40,
    captum_pairs: int = 5,
    internal_batch: int = 10,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every kind of request at every layer (default: all) as a multiple of a plain one, with its bound.

    `request`: through the engine, bytes in, document out, over a plain request; `model`: without decoding and
    documents, over `model(x)`. captum_pairs: of Captum's methods, which take long; 0 for none. LayerError for an
    unknown layer.
    """
    tell = progress or (lambda *_: None)
    names = [bench.model.state(name).name for name in layers] if layers else bench.model.layers
    tell("requests", 0, len(names) * len(KINDS))
    found: dict[str, Any] = {
        "environment": environment(),
        "checkpoint_sha256": bench.model.manifest.checkpoint_sha256,
        "images": len(bench.samples),
        "plain_ms": {"request": _median_ms(bench.request(), pairs), "model": _median_ms(bench.predict, pairs)},
        "layers": [],
    }
    for name in names:
        share, tops = tail_share(bench, name, pairs), bench.top_concepts(name)
        costs = []
        for kind in KINDS:
            costs.append(kind_cost(bench, kind, name, tops, share.median, pairs))
            tell("requests", 1, None)
        found["layers"].append({"layer": name, "tail_share": asdict(share), "kinds": costs})
    if captum_pairs:
        tell("Captum", 0, len(names) + 1)
        for entry in found["layers"]:
            entry["captum_layer_ig"] = asdict(captum_cost(bench, entry["layer"], captum_pairs, internal_batch))
            tell("Captum", 1, None)
        found["captum_pixel_ig"] = asdict(captum_cost(bench, None, captum_pairs, internal_batch))
        tell("Captum", 1, None)
    return found


def kind_cost(bench: Workbench, kind: Kind, layer: str, tops: list[str], share: float, pairs: int) -> dict[str, Any]:
    """One kind of request at one layer. share: t; tops: the concept to ablate in each image."""
    ask = bench.request([kind.document(layer, top) for top in tops])

    def of_model(number: int) -> Any:
        return kind.of_model(bench.model, bench.sample(number).x, layer, tops[number % len(tops)])

    request, model = paired(bench.request(), ask, pairs), paired(bench.predict, of_model, pairs)
    bound = round(kind.bound(share), 4)
    return {
        "kind": kind.name,
        "bound": bound,
        "request": {**asdict(request), "met": request.median <= bound},
        "model": {**asdict(model), "met": model.median <= bound},
    }


def paired(plain: Call, other: Call, pairs: int) -> Ratio:
    """The time of `other` over that of `plain`, each pair about one image, neither always first."""
    plain(0)
    other(0)
    ratios = []
    for pair in range(pairs):
        times = {}
        for which in ((plain, other), (other, plain))[pair % 2]:
            times[which] = _seconds(which, pair)
        ratios.append(times[other] / times[plain])
    return Ratio.of(ratios)


def tail_share(bench: Workbench, layer: str, passes: int) -> Ratio:
    """t: the part of a plain forward pass that comes after the layer's output."""
    left = [0.0]

    def look(*_: Any) -> None:
        left[0] = _now()

    shares = []
    bench.predict(0)
    with _hook(bench.model.states[layer].linear.module, look):
        for number in range(passes):
            start = _now()
            bench.predict(number)
            end = _now()
            shares.append((end - left[0]) / (end - start))
    return Ratio.of(shares)


def captum_cost(bench: Workbench, layer: str | None, pairs: int, internal_batch: int = 10) -> Ratio:
    """Captum's integrated gradients of the top class with 50 steps over a prediction `model(x)`: attributed to a
    layer's output, or to the pixels (None). internal_batch: steps that share a pass."""
    try:
        from captum.attr import IntegratedGradients, LayerIntegratedGradients
    except ImportError as error:
        raise EludeError(
            "Captum is not installed; install it (pip install captum), or leave its rows out with --captum-pairs 0."
        ) from error
    base = bench.model.base
    method = IntegratedGradients(base) if layer is None else LayerIntegratedGradients(base, base.get_submodule(layer))
    tops = [int(bench.predict(number).argmax()) for number in range(len(bench.samples))]

    def attribute(number: int) -> Tensor:
        return method.attribute(
            bench.sample(number).x, target=tops[number % len(tops)], n_steps=CAPTUM_STEPS,
            internal_batch_size=internal_batch,
        )  # fmt: skip

    return paired(bench.predict, attribute, pairs)


@contextmanager
def _hook(module: torch.nn.Module, look: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _seconds(call: Call, number: int) -> float:
    start = _now()
    call(number)
    return _now() - start


def _now() -> float:
    """Seconds, when what a GPU was given to do is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _median_ms(call: Call, times: int) -> float:
    call(0)
    return round(1e3 * statistics.median(_seconds(call, number) for number in range(times)), 2)
