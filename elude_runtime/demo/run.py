"""The whole main job on the embedded default: pictures, rewrite, certificate, catalogue, report, archive, a real
server, and the story of a spurious feature that is found and switched off by a request."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.torchserve import Server
from elude_runtime.demo.found import TOP_FEATURES, Found, accuracy_by_group, look_at, notable
from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS, Sample, make_set
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import CALIBRATION, demo_data_config, rewrite_demo, write_calibration
from elude_runtime.errors import EludeError
from elude_runtime.network.preprocessing import DataConfig, to_input
from elude_runtime.offline.catalogue.run import make_catalogue
from elude_runtime.offline.report.report import write_report
from elude_runtime.offline.verify import Verification, verify

STREAM, GROUPS = 240, 480
_CLIENTS = 8
_NAME = "demo"
Report = Callable[[str], None]


@dataclass
class Story:
    """What the demo did and saw; `failures` says which steps did not hold; pages: the first of the features' report."""

    out: Path
    pages: Path | None = None
    verification: Verification | None = None
    equal_replies: int = 0
    compared_replies: int = 0
    example: Image.Image | None = None
    explained: dict[str, Any] = field(default_factory=dict)
    steered: dict[str, Any] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    before: dict[tuple[str, bool], float] = field(default_factory=dict)
    after: dict[tuple[str, bool], float] = field(default_factory=dict)
    unchanged_defaults: bool = False
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def summary(self) -> list[tuple[str, float, float]]:
        """(which pictures, accuracy by default, accuracy with the edits), the group that it hurts most first.

        That is the worst class among the toys that wear the watermark without being of the suspicious class. Cracked
        toys without it are worse off still, but not for the watermark's presence: no steering adds what a network
        never learned, and they stand in a row of their own.
        """
        suspicious = CLASSES[WATERMARK_CLASS]
        misled = [g for g in self.before if g[1] and g[0] != suspicious]
        worst = min(misled, key=lambda g: (self.before[g], self.after[g]))
        rows = [(f"worst group: {worst[0]}, watermark", self.before[worst], self.after[worst])]
        for text, marked, is_class in (
            ("all other toys with the watermark", True, False),
            ("all other toys without it", False, False),
            (f"{suspicious}s with the watermark", True, True),
            (f"{suspicious}s without it", False, True),
        ):
            groups = [g for g in self.before if g[1] == marked and (g[0] == suspicious) == is_class]
            means = [float(np.mean([accuracy[g] for g in groups])) for accuracy in (self.before, self.after)]
            rows.append((text, means[0], means[1]))
        return rows


def run(out: Path, say: Report) -> Story:
    """Make everything anew in `out`; `say` is told of each finished step. A step that does not hold is listed in
    `Story.failures`; EludeError when the job cannot go on."""
    started = time.monotonic()
    story = Story(out)
    out.mkdir(parents=True, exist_ok=True)
    model, config = load_demo_model()
    data = demo_data_config(config)
    write_calibration(out / "images")
    say(f"{CALIBRATION} pictures of toys, in {out / 'images'}")

    checkpoint = out / "checkpoint"
    made = rewrite_demo(model, config, out / "images", checkpoint)
    layer = made.layers[0]
    parts = " + ".join(f"{t.concepts} on {t.name}" for t in layer.token_types)
    say(f"rewrite: {layer.name}, {layer.neurons} neurons into sub-units and concepts ({parts})")

    base, _ = load_demo_model()  # the base model again, from its own weights
    story.verification = verify(checkpoint, base, data, out / "images")
    for check in story.verification.checks:
        if check.holds is not True:
            story.failures.append(f"verify, {check.name}: {check.detail}")
    exact = story.verification
    say(
        f"verify: {sum(c.holds is True for c in exact.checks)} of {len(exact.checks)} checks hold, "
        f"on {exact.images} pictures"
    )

    catalogue = make_catalogue(checkpoint, out / "images", batch_size=50)
    say(
        f"catalogue: {sum(catalogue.features.values())} features with exemplars, "
        f"{sum(catalogue.labels.values())} of them with a label"
    )
    story.pages = write_report(checkpoint, out / "report", force=True).page
    say(f"report: {story.pages}, their pictures, in any browser")

    archive = build_archive(checkpoint, out / "model_store", name=_NAME, force=True)
    say(f"archive: {archive} ({archive.stat().st_size / 2**20:.1f} MiB, no pickle)")
    with Server(out / "model_store", [archive.name], token_auth=False) as server:
        server.wait_ready(120)
        say(f"serve: TorchServe answers on {server.url}")
        _questions(story, server.url, base, load(checkpoint), data, say)
    say("server stopped")
    story.seconds = time.monotonic() - started
    return story


def _questions(
    story: Story, url: str, base: torch.nn.Module, loaded: EludeModel, data: DataConfig, say: Report
) -> None:
    """Everything that is asked of the running server."""
    _compare_predictions(story, url, base, data)
    say(
        f"predict: {story.equal_replies} of {story.compared_replies} replies equal the base model's float32 values, "
        "digit for digit"
    )
    stream = make_set(STREAM, seed=2, split="train", workers=2)
    groups = make_set(GROUPS, seed=3, split="groups", workers=2)
    replies = _ask(url, stream, {"explain": {"targets": [WATERMARK_CLASS], "top_features": TOP_FEATURES}})
    suspects = [i for i, r in enumerate(replies) if r["answer"]["index"] == WATERMARK_CLASS]
    if not suspects:
        raise EludeError(
            "The demo model never answers with its suspicious class; its weights are not the shipped ones."
        )
    story.example, story.explained = stream[suspects[0]].image, replies[suspects[0]]
    names = notable([_attributions(replies[i]) for i in suspects])
    # In that stream watermark and class go together: only balanced pictures show that a feature tells the watermark.
    story.found = look_at(names, groups, loaded, data)
    say(f"explain: '{CLASSES[WATERMARK_CLASS]}' rests on " + " and ".join(f.name for f in story.found))
    if not any(f.tells for f in story.found):
        story.failures.append("explain: the watermark is not among the top features")

    edits = [{"feature": f.name, "mode": "ablate"} for f in story.found]
    plain = _ask(url, groups, {})
    steered = _ask(url, groups, {"steer": {"edits": edits}})
    story.steered = steered[0]
    story.before = accuracy_by_group(groups, [r["predictions"][0]["index"] for r in steered])
    story.after = accuracy_by_group(groups, [r["steered"]["predictions"][0]["index"] for r in steered])
    story.unchanged_defaults = all(
        a["predictions"][0]["index"] == b["predictions"][0]["index"] for a, b in zip(plain, steered, strict=True)
    )
    if not story.unchanged_defaults:
        story.failures.append("steer: a default prediction changed")
    _, worst_before, worst_after = story.summary[0]
    if worst_after <= worst_before:
        story.failures.append("steer: the worst group did not gain")
    say(f"steer: {len(groups)} pictures with {len(edits)} features ablated by the request")


def _compare_predictions(story: Story, url: str, base: torch.nn.Module, data: DataConfig, count: int = 12) -> None:
    """Replies one at a time against the base model on a batch of one: every logit, as float32."""
    transform = data.transform()
    for sample in make_set(count, seed=4):
        reply = _post(url, {"image": _encoded(sample.image), "top_k": len(CLASSES)})
        with torch.no_grad():
            expected = base(to_input(sample.image, transform)[None])[0].numpy()
        logits = {p["index"]: np.float32(p["logit"]) for p in reply["predictions"]}
        story.compared_replies += 1
        story.equal_replies += all(logits[i] == expected[i] for i in range(len(expected)))
    if story.equal_replies != story.compared_replies:
        story.failures.append("predict: a reply differs from the base model")


def _attributions(reply: dict[str, Any]) -> dict[str, float]:
    """{feature: attribution} of a reply's first target, over all layers."""
    layers = reply["explanations"][0]["layers"]
    return {f["feature"]: f["attribution"] for layer in layers for f in layer["features"]}


def _encoded(image: Image.Image) -> dict[str, str]:
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"b64": base64.b64encode(data.getvalue()).decode()}


def _ask(url: str, samples: Sequence[Sample], document: dict[str, Any]) -> list[dict[str, Any]]:
    """One request a picture, several at a time, so that the server forms batches."""
    with ThreadPoolExecutor(_CLIENTS) as pool:
        return list(pool.map(lambda s: _post(url, {"image": _encoded(s.image), **document}), samples))


def _post(url: str, document: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/predictions/{_NAME}", json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise EludeError(f"The server refused a request ({error.code}): {error.read().decode()[:300]}") from error
