"""KServe's protocols: version 1 with a document or problem an instance, version 2 with tensors in and out."""

from __future__ import annotations

import io
import json
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from api_rows import (
    PNG,
    ask,
    b64,
    body,
    content,
    counted,
    document,
    engine_of,
    inputs,
    opened,
    problem,
    problem_document,
    raw,
    read,
    refused,
    reply,
    steer,
)
from conftest import Rewritten
from PIL import Image
from support import FIRST, SECOND, encoded, picture
from torch import Tensor

from elude_runtime.api.engine import Engine
from elude_runtime.api.schema.kserve import V1Reply, V2Reply
from elude_runtime.network.preprocessing import decode_image

P0 = f"{SECOND}/P0"
IMAGES = [encoded(picture(900 + n, 50 - n, 40 + n)) for n in range(4)]
EXPLAIN = {"explain": {"layers": [SECOND], "top_features": 3}}
ABLATE = {"feature": P0, "mode": "ablate"}
WILD = steer({"feature": P0, "mode": "scale", "value": 1e38}, strength_multiplier=1e38)
PICTURE_PIXELS = Image.open(io.BytesIO(PNG)).width * Image.open(io.BytesIO(PNG)).height
Document = dict[str, Any]


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return opened(vit)


def infer(*images: bytes, **more: Any) -> Document:
    """A version 2 request of encoded images."""
    given = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": [b64(i)["b64"] for i in images]}
    return {"inputs": [given], **more}


def tensor(images: Tensor, data: Any = None, **more: Any) -> Document:
    """A version 2 request of normalised images."""
    data = images.flatten().tolist() if data is None else data
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(images.shape), "data": data}], **more}


def outputs(engine: Engine, asked: Document, **row: Any) -> Document:
    """The outputs of a version 2 request by name, documents parsed."""
    (answered,) = engine.answer([body(asked, **row)])
    made = V2Reply.model_validate_json(answered.body)
    found: Document = {"id": made.id, "model": (made.model_name, made.model_version), "names": []}
    for output in made.outputs:
        found["names"].append(output.name)
        if output.name == "logits":
            assert output.datatype == "FP32" and all(type(v) is float for v in output.data)
            found["logits"] = np.float32(output.data).reshape(output.shape)
        else:
            assert output.datatype == "BYTES" and output.shape == [len(output.data)]
            found["elude"] = [json.loads(text) for text in output.data]
    return found


def predictions(engine: Engine, instances: list[Any], **row: Any) -> list[Document]:
    """The documents of a version 1 request."""
    (answered,) = engine.answer([body({"instances": instances}, **row)])
    made = read(answered)
    V1Reply.model_validate_json(answered.body)
    assert list(made) == ["predictions"] and len(made["predictions"]) == len(instances)
    return made["predictions"]


class TestVersion1:
    def test_predict(self, engine: Engine) -> None:
        """An instance is an image and nothing else, or a whole document; all share one forward pass."""
        instances = [b64(IMAGES[0]), {"image": b64(IMAGES[1]), "id": "second", "top_k": 2, **steer(ABLATE)}]
        with counted(engine.model) as passes:
            first, second = predictions(engine, instances)
        assert passes.forward == [2]
        alone = engine.answer([raw(IMAGES[0]), document(instances[1] | {"image": b64(IMAGES[1])}, IMAGES[1])])
        for found, answered in zip((first, second), alone, strict=True):
            assert content(found) == content(reply(answered)) and found["batch_size"] == 2
        assert second["id"] == "second" and len(second["predictions"]) == 2 and second["steered"]
        assert first["explanations"] is None and first["steered"] is None

    def test_explain(self, engine: Engine) -> None:
        first, second = predictions(engine, [b64(PNG), {"image": b64(PNG), **EXPLAIN}], explain=True)
        assert len(first["explanations"][0]["layers"]) == 2
        assert [e["layer"] for e in second["explanations"][0]["layers"]] == [SECOND]
        assert predictions(engine, [b64(PNG)])[0]["explanations"] is None

    def test_a_problem_is_its_instances_own(self, engine: Engine) -> None:
        """Its places are in the instance, and the others are answered as without it."""
        bad = [
            ("invalid-image", {"b64": "AAAA"}, None),
            ("invalid-document", {"image": b64(PNG), "top_k": "3"}, ["instances", 3, "top_k"]),
            ("unknown-layer", {"image": b64(PNG), "explain": {"layers": ["x"]}},
             ["instances", 4, "explain", "layers", 0]),
            ("unknown-feature", {"image": b64(PNG), **steer({**ABLATE, "feature": f"{SECOND}/P999"})},
             ["instances", 5, "steer", "edits", 0, "feature"]),
            ("unknown-label", {"image": b64(PNG), "explain": {"targets": ["top1", {"label": "bea"}]}},
             ["instances", 6, "explain", "targets", 1]),
            ("other-checkpoint", {"image": b64(PNG), "expect": {"checkpoint_sha256": "0"}}, None),
            ("non-finite-output", {"image": b64(PNG), **WILD}, None),
            ("invalid-document", {}, ["instances", 9, "image"]),
        ]  # fmt: skip
        good = [b64(IMAGES[0]), {"image": b64(IMAGES[1]), **EXPLAIN}]
        found = predictions(engine, [*good, *(instance for _, instance, _ in bad)])
        for made, (kind, _, loc) in zip(found[2:], bad, strict=True):
            problem_document(made, made["status"])
            assert made["type"] == kind, made
            if loc is not None:
                assert made["errors"][0]["loc"] == loc
        for made, alone in zip(found, predictions(engine, good), strict=False):
            assert [p["index"] for p in made["predictions"]] == [p["index"] for p in alone["predictions"]]
            for p, q in zip(made["predictions"], alone["predictions"], strict=True):
                assert p["logit"] == pytest.approx(q["logit"], abs=1e-5)

    def test_nothing_but_problems(self, engine: Engine) -> None:
        assert [p["type"] for p in predictions(engine, [{"b64": "%"}, {"b64": ""}])] == ["invalid-image"] * 2

    def test_beside_other_rows(self, engine: Engine) -> None:
        found = engine.answer([raw(), body({"instances": [b64(PNG), b64(IMAGES[0])]}), document(EXPLAIN)])
        assert reply(found[0])["batch_size"] == 4
        assert [p["batch_size"] for p in read(found[1])["predictions"]] == [4, 4]
        assert read(found[1])["predictions"][0]["predictions"] == reply(found[0])["predictions"]

    @pytest.mark.parametrize(
        ("asked", "kind", "loc"),
        [
            ({"instances": []}, "invalid-document", ["instances"]),
            ({"instances": {"b64": ""}}, "invalid-document", ["instances"]),
            ({"instances": ["text"]}, "invalid-document", ["instances", 0]),
            ({"instances": [{}], "parameters": {}}, "invalid-document", ["parameters"]),
            ({"instances": [{}], "inputs": []}, "invalid-document", ["inputs"]),
            ({"instances": [{"b64": ""}] * 33}, "limit-exceeded", None),
        ],
    )
    def test_a_wrong_envelope_is_one_problem(
        self, engine: Engine, asked: Document, kind: str, loc: list[Any] | None
    ) -> None:
        found = refused(engine, body(asked), kind)
        assert loc is None or found["errors"][0]["loc"] == loc

    def test_the_number_of_images_is_the_operators(self, vit: Rewritten) -> None:
        small = engine_of(vit.model, max_instances=2)
        assert len(predictions(small, [b64(PNG)] * 2)) == 2
        for asked in ({"instances": [b64(PNG)] * 3}, infer(PNG, PNG, PNG)):
            assert "3 images, the limit is 2" in refused(small, body(asked), "limit-exceeded")["detail"]


class TestVersion2:
    def test_encoded_images(self, engine: Engine) -> None:
        """The base model's logits on these images in one batch, bit for bit, and a document for each."""
        found = outputs(engine, infer(*IMAGES, id="v2.1"))
        with torch.no_grad():
            expected = engine.model.base(inputs(engine.model, *IMAGES))
        assert found["names"] == ["logits", "elude"] and (found["id"], found["model"]) == ("v2.1", ("tiny", "1.0"))
        assert np.array_equal(found["logits"], expected.numpy())
        alone = [reply(a) for a in engine.answer([raw(image) for image in IMAGES])]
        assert [content(made) for made in found["elude"]] == [content(made) for made in alone]
        assert {made["id"] for made in found["elude"]} == {"v2.1"}

    @pytest.mark.parametrize("nested", [False, True])
    def test_normalised_images(self, engine: Engine, nested: bool) -> None:
        """What comes in is what the base model gets, whatever numbers these are."""
        images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2
        with torch.no_grad():
            expected = engine.model.base(images)
        found = outputs(engine, tensor(images, images.tolist() if nested else None))
        assert np.array_equal(found["logits"], expected.numpy())
        for made, logits in zip(found["elude"], expected, strict=True):
            assert made["predictions"][0]["index"] == int(logits.argmax())
            size = {"width": 32, "height": 32, "crop": [0, 0, 32, 32], "window": [0.0, 0.0, 32.0, 32.0]}
            assert made["input"] == size

    def test_whole_numbers_are_numbers(self, engine: Engine) -> None:
        images = torch.ones(1, 3, 32, 32)
        found = outputs(engine, tensor(images, [1] * images.numel()))
        with torch.no_grad():
            assert np.array_equal(found["logits"], engine.model.base(images).numpy())

    def test_both_kinds_of_input_say_the_same(self, engine: Engine) -> None:
        parameters = {"elude": {**EXPLAIN, **steer({**ABLATE, "apply": {"tokens": "patches"}})}}
        encoded_ = outputs(engine, infer(*IMAGES[:2], parameters=parameters))
        given = outputs(engine, tensor(inputs(engine.model, *IMAGES[:2]), parameters=parameters))
        assert np.array_equal(encoded_["logits"], given["logits"])
        for one, other in zip(encoded_["elude"], given["elude"], strict=True):
            one, other = ({k: v for k, v in content(made).items() if k != "input"} for made in (one, other))
            assert one == other and one["explanations"] and one["steered"]

    def test_the_scope_of_a_normalised_image_is_its_own(self, engine: Engine) -> None:
        """No crop lies between it and the model: a box on its left half means its left patches."""
        image = inputs(engine.model, IMAGES[0])
        given = []
        for scope in ({"box": [0.0, 0.0, 0.5, 1.0]}, {"mask": [[1, 0]]}):
            edit = {"feature": P0, "mode": "add", "value": 3.0, "apply": scope}
            given.append(outputs(engine, tensor(image, parameters={"elude": steer(edit)}))["elude"][0]["steered"])
        assert given[0] == given[1] and given[0]["changes"][0]["change"] != 0

    def test_an_embedding(self, headless: Rewritten) -> None:
        engine = engine_of(headless.model)
        image = inputs(headless.model, PNG)
        with torch.no_grad():
            expected = headless.base(image)
        found = outputs(engine, tensor(image))
        assert np.array_equal(found["logits"], expected.numpy())
        assert np.array_equal(np.float32(found["elude"][0]["embedding"]), expected[0].numpy())

    def test_outputs_that_are_asked_for(self, engine: Engine) -> None:
        for names in (["elude"], ["logits"], ["elude", "logits"]):
            asked = infer(PNG, outputs=[{"name": n} for n in names])
            assert outputs(engine, asked)["names"] == names

    @pytest.mark.parametrize("as_text", [False, True])
    def test_parameters_hold_for_all_images(self, engine: Engine, as_text: bool) -> None:
        """As an object, or for clients whose parameters are flat as its JSON text."""
        asked: Document = {"top_k": 2, **EXPLAIN}
        parameters = {"elude": json.dumps(asked) if as_text else asked}
        found = outputs(engine, infer(*IMAGES[:3], parameters=parameters))
        alone = [reply(a) for a in engine.answer([document(asked, image) for image in IMAGES[:3]])]
        assert [content(made) for made in found["elude"]] == [content(made) for made in alone]

    def test_the_explain_path(self, engine: Engine) -> None:
        (made,) = outputs(engine, infer(PNG), explain=True)["elude"]
        assert made["explanations"]
        assert outputs(engine, infer(PNG))["elude"][0]["explanations"] is None
        (made,) = outputs(engine, infer(PNG, parameters={"elude": EXPLAIN}), explain=True)["elude"]
        assert [e["layer"] for e in made["explanations"][0]["layers"]] == [SECOND]

    def test_identities(self, engine: Engine) -> None:
        """The request's id is the documents' too, unless these have one; without any the reply has a document's."""
        found = outputs(engine, infer(PNG, id="outer", parameters={"elude": {"id": "inner"}}))
        assert found["id"] == "outer" and found["elude"][0]["id"] == "inner"
        found = outputs(engine, infer(PNG, IMAGES[0]))
        assert found["id"] == found["elude"][0]["id"] != ""
        assert outputs(engine, infer(PNG))["id"] != outputs(engine, infer(PNG))["id"]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"datatype": "INT8"}, "datatype"),
            ({"shape": []}, "shape"),
            ({"shape": [0]}, "shape"),
            ({"shape": [2]}, "2 images|there are 1|have N images"),
            ({"shape": [1, 1]}, "have N images"),
            ({"data": [7]}, "JSON strings"),
            ({"data": ["%"]}, "base64"),
            ({"colour": 1}, "colour"),
            ({"datatype": "FP32", "data": [0.0]}, r"\[N, 3, 32, 32\]"),
            ({"datatype": "FP32", "shape": [1, 3, 16, 64], "data": [0.0] * 3072}, r"\[N, 3, 32, 32\]"),
            ({"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.0] * 3071}, "3072 numbers, and there are 3071"),
            ({"datatype": "FP32", "shape": [1, 3, 32, 32], "data": ["0"] * 3072}, "numbers"),
            ({"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [True] * 3072}, "numbers"),
            ({"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [1e39] * 3072}, "too large for FP32"),
            ({"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [[0.0] * 1024, 0.0, [0.0] * 1024]}, "unevenly"),
        ],
    )
    def test_inputs_that_do_not_fit(self, engine: Engine, given: Document, said: str) -> None:
        asked = infer(PNG)
        asked["inputs"][0].update(given)
        kind = "invalid-image" if given.get("data") == ["%"] else "invalid-document"
        found = refused(engine, body(asked), kind)
        assert any(part in json.dumps(found) for part in said.replace("\\", "").split("|")), found
        assert "inputs" in json.dumps(found)

    @pytest.mark.parametrize(
        ("more", "kind", "said"),
        [
            ({"inputs": []}, "invalid-document", "inputs"),
            ({"inputs": infer(PNG)["inputs"] * 2}, "invalid-document", "inputs"),
            ({"outputs": [{"name": "probabilities"}]}, "invalid-document", "outputs"),
            ({"outputs": []}, "invalid-document", "outputs"),
            ({"id": "two words"}, "invalid-document", "id"),
            ({"parameters": {"elude": "{"}}, "not-json", "parameters.elude"),
            ({"parameters": {"elude": '{"top_k": NaN}'}}, "not-json", "parameters.elude"),
            ({"parameters": {"elude": {"image": b64(PNG)}}}, "invalid-document", "leave `image` out"),
            ({"parameters": {"elude": {"colour": 1}}}, "invalid-document", "colour"),
            ({"parameters": {"colour": 1}}, "invalid-document", "colour"),
            ({"parameters": {"elude": {"explain": {"layers": ["x"]}}}}, "unknown-layer", "split layer"),
            ({"parameters": {"elude": {"explain": {"steps": 65}}}}, "limit-exceeded", "steps"),
            ({"colour": 1}, "invalid-document", "colour"),
        ],
    )  # fmt: skip
    def test_envelopes_that_are_wrong(self, engine: Engine, more: Document, kind: str, said: str) -> None:
        assert said in json.dumps(refused(engine, body({**infer(PNG), **more}), kind))

    @pytest.mark.parametrize(
        ("elude", "kind", "loc"),
        [
            ({"explain": {"layers": ["x"]}}, "unknown-layer", ["explain", "layers", 0]),
            (steer({**ABLATE, "feature": f"{SECOND}/P999"}), "unknown-feature", ["steer", "edits", 0, "feature"]),
            ({"explain": {"targets": [{"label": "bea"}]}}, "unknown-label", ["explain", "targets", 0]),
        ],
    )
    def test_the_place_of_a_problem_is_in_the_parameters(
        self, engine: Engine, elude: Document, kind: str, loc: list[Any]
    ) -> None:
        """The question stands there once, for all images."""
        found = refused(engine, body(infer(PNG, PNG, parameters={"elude": elude})), kind)
        assert found["errors"][0]["loc"] == ["parameters", "elude", *loc]

    @pytest.mark.parametrize(
        ("asked", "loc"),
        [
            (infer(PNG, parameters={"elude": {"top_k": "3"}}), ["parameters", "elude", "top_k"]),
            (infer(PNG, b"junk"), ["inputs", 0, "data", 1]),
        ],
    )
    def test_the_place_of_what_does_not_validate(self, engine: Engine, asked: Document, loc: list[Any]) -> None:
        (answered,) = engine.answer([body(asked)])
        assert [e["loc"] for e in problem(answered).get("errors", [])] == [loc]

    def test_one_image_that_fails_fails_the_request(self, engine: Engine) -> None:
        """Tensors have no place for a problem."""
        found = refused(engine, body(infer(PNG, b"junk", IMAGES[0])), "invalid-image")
        assert found["status"] == 422
        wild = torch.cat([inputs(engine.model, PNG), torch.full((1, 3, 32, 32), 3e38)])
        bad, good = engine.answer([body(tensor(wild)), raw()])
        assert problem(bad)["type"] == "non-finite-output"
        assert reply(good)["batch_size"] == 3

    def test_too_long_a_reply(self, vit: Rewritten) -> None:
        small = engine_of(vit.model, max_response_bytes=10_000, max_work=200, max_batch_work=200)
        assert outputs(small, infer(PNG, outputs=[{"name": "logits"}] * 1))["names"] == ["logits"]
        asked = infer(*[PNG] * 12, parameters={"elude": {"explain": {"layers": [FIRST]}}})
        assert "fewer images" in refused(small, body(asked), "response-too-large")["detail"]

    def test_plain_documents_stay_plain(self, engine: Engine) -> None:
        """A multipart request whose document says `inputs` is no KServe request."""
        asked = ask(engine, document({"top_k": 3}))
        assert "outputs" not in asked and len(asked["predictions"]) == 3


class TestImages:
    def test_all_of_a_request_have_a_limit_together(self, vit: Rewritten) -> None:
        """Each is small enough; the third is beyond what one request may have decoded."""
        limited = engine_of(vit.model, max_request_pixels=2 * PICTURE_PIXELS)
        one = {"b64": b64(PNG)["b64"]}
        (answered,) = limited.answer([body({"instances": [one, one, one]})])
        kinds = [p.get("type", "answer") for p in json.loads(answered.body)["predictions"]]
        assert kinds == ["answer", "answer", "image-too-large"]
        assert "in all" in refused(limited, body(infer(PNG, PNG, PNG)), "image-too-large")["detail"]

    def test_none_is_kept_at_its_own_size(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """One after the other is decoded, preprocessed and dropped."""
        alive: list[Any] = []
        most = 0

        def watched(*arguments: Any, **options: Any) -> Image.Image:
            nonlocal most
            image = decode_image(*arguments, **options)
            alive.append(weakref.ref(image))
            most = max(most, sum(ref() is not None for ref in alive))
            return image

        monkeypatch.setattr("elude_runtime.api.intake.decode_image", watched)
        (answered,) = engine.answer([body({"instances": [b64(PNG)] * 8})])
        assert answered.status == 200 and len(alive) == 8 and most <= 2

    def test_logits_are_the_shortest_text_of_a_float32(self, engine: Engine) -> None:
        (answered,) = engine.answer([body(infer(PNG))])
        text = answered.body.partition('"logits"')[2].partition('"data":[')[2].partition("]")[0]
        assert text.split(",") == [str(v) for v in np.array(text.split(","), np.float32)]
