"""`elude policy`: set, list, show and remove; what is stored is what requests and servers act by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS, VIT_DATA, Run, encoded, manifest_of, picture, refused, tiny_vit

import elude_runtime as elude
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.checkpoint.policies import read_policies, save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli.policy import list_policies
from elude_runtime.errors import CheckpointError

P0, P1, C0 = f"{SECOND}/P0", f"{SECOND}/P1", f"{SECOND}/C0"
PICTURE = encoded(picture(900))
Document = dict[str, Any]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    file.write_bytes(PICTURE)
    return file


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    """A copy of the tiny ViT's checkpoint with a stored vector."""
    path = Path(shutil.copytree(vit.path, tmp_path / "ckpt"))
    save_vector(path, vector("stripes", path))
    return path


@pytest.fixture(scope="module")
def rewritten_again(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The same network, rewritten with another seed."""
    out = tmp_path_factory.mktemp("again") / "ckpt"
    elude.rewrite(
        tiny_vit(), pictures, out=out, layers=[SECOND, FIRST], subunits=4, concepts=6, tokens=24, seed=11,
        data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    return out


@pytest.fixture
def again(rewritten_again: Path, checkpoint: Path, run: Run, tmp_path: Path) -> Path:
    """A copy of that, with two policies that were made for the partition before."""
    for name in ("first", "second"):
        assert run("policy", "set", checkpoint, name, "--edit", f"{P0}:ablate").code == 0
    path = Path(shutil.copytree(rewritten_again, tmp_path / "again"))
    shutil.copy(checkpoint / "policies.json", path)
    return path


def vector(name: str, checkpoint: Path, first: float = -1.0) -> StoredVector:
    direction = np.linspace(first, 1, 32).astype(np.float32)
    return StoredVector(
        name, SECOND, manifest_of(checkpoint).partition_sha256, "2026-01-01", direction, [], [], None, 3, 3
    )


def stored(checkpoint: Path) -> dict[str, Document]:
    return read_policies(checkpoint, manifest_of(checkpoint).partition_sha256)


def set_(run: Run, checkpoint: Path, name: str, *options: object) -> Document:
    ran = run("policy", "set", checkpoint, name, *options, "--json")
    assert ran.code == 0, ran.err
    return ran.document


def steered(run: Run, checkpoint: Path, image: Path, *options: object) -> list[Document]:
    ran = run("steer", image, "--ckpt", checkpoint, "--json", *options)
    assert ran.code == 0, ran.err
    return ran.document["steered"]["changes"]


def engine(checkpoint: Path, **config: Any) -> Engine:
    return Engine.open(checkpoint, ServingConfig(**config), name="tiny", version="1.0")


def reply(served: Engine, request: Document) -> Document:
    parts = {"image": PICTURE, "request": json.dumps(request).encode()}
    (answered,) = served.answer([Row(parts, "multipart/form-data", False, "", "r")])
    assert answered.status == 200, answered.body
    return json.loads(answered.body)


class TestSet:
    def test_edits_and_vectors(self, run: Run, vit: Rewritten, checkpoint: Path) -> None:
        made = set_(
            run, checkpoint, "quiet", "--edit", f"{P0}:scale=0.5@box=0,0,0.5,1", "--edit", f"{C0}:ablate",
            "--vector", "stripes=-2", "--description", "Leaves the stripes out.",
        )  # fmt: skip
        assert made["name"] == "quiet" and made["replaced"] is False
        assert stored(checkpoint) == {
            "quiet": {
                "partition_sha256": vit.model.manifest.partition_sha256,
                "description": "Leaves the stripes out.",
                "edits": [
                    {"feature": P0, "mode": "scale", "value": 0.5, "apply": {"box": [0.0, 0.0, 0.5, 1.0]}},
                    {"feature": C0, "mode": "ablate"},
                ],
                "vectors": [{"name": "stripes", "strength": -2.0}],
            }
        }

    def test_what_is_printed(self, run: Run, checkpoint: Path) -> None:
        first = run("policy", "set", checkpoint, "quiet", "--edit", f"{P0}:ablate")
        assert first.code == 0 and first.err == ""
        digest = run("policy", "show", checkpoint, "quiet", "--json").document["sha256"]
        assert first.out.startswith(f"Policy quiet stored, sha256 {digest[:12]}.")
        assert '{"policies": ["quiet"]}' in first.out
        assert "Policy quiet replaced" in run("policy", "set", checkpoint, "quiet", "--edit", f"{P1}:ablate").out

    def test_one_of_the_same_name_is_replaced_and_no_other(self, run: Run, checkpoint: Path) -> None:
        first = set_(run, checkpoint, "quiet", "--edit", f"{P0}:ablate")
        set_(run, checkpoint, "loud", "--edit", f"{P0}:scale=3")
        again = set_(run, checkpoint, "quiet", "--edit", f"{P1}:ablate")
        assert again["replaced"] is True and again["sha256"] != first["sha256"]
        found = stored(checkpoint)
        assert {n: [e["feature"] for e in d["edits"]] for n, d in found.items()} == {"quiet": [P1], "loud": [P0]}

    def test_a_file_and_more(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        """What a request's `steer` holds, and options that add to it."""
        document = {
            "edits": [{"feature": P0, "mode": "cap", "value": 1.5, "unit": "std", "side": "positive"}],
            "conflict": "sum",
            "strength_multiplier": 0.5,
            "when": {"feature": P1, "op": ">", "value": -100.0},
            "description": "from the file",
        }
        (tmp_path / "p.json").write_text(json.dumps(document))
        set_(run, checkpoint, "quiet", "--file", tmp_path / "p.json")
        assert stored(checkpoint)["quiet"].items() >= document.items()
        set_(
            run, checkpoint, "quiet", "--file", tmp_path / "p.json", "--edit", f"{P0}:add=1", "--vector", "stripes",
            "--description", "from the options",
        )  # fmt: skip
        found = stored(checkpoint)["quiet"]
        assert found["edits"] == [*document["edits"], {"feature": P0, "mode": "add", "value": 1.0}]
        assert found["vectors"] == [{"name": "stripes", "strength": 1.0}]
        assert found["description"] == "from the options" and found["conflict"] == "sum"

    def test_what_is_shown_can_be_set_again(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        options = ("--edit", f"{P0}:scale=0.1", "--vector", "stripes=0.3", "--description", "naïve […] “words”")
        first = set_(run, checkpoint, "quiet", *options)
        (tmp_path / "p.json").write_text(run("policy", "show", checkpoint, "quiet").out)
        again = set_(run, checkpoint, "copy", "--file", tmp_path / "p.json")
        assert again["sha256"] == first["sha256"] and stored(checkpoint)["copy"] == stored(checkpoint)["quiet"]


class TestListAndShow:
    def test_none(self, run: Run, checkpoint: Path) -> None:
        assert "No policy is stored" in run("policy", "list", checkpoint).out
        assert run("policy", "list", checkpoint, "--json").document == []
        refused(run("policy", "show", checkpoint, "quiet"), "no policy 'quiet'", "None is stored", "policy set")

    def test_several(self, run: Run, checkpoint: Path) -> None:
        made = {
            "quiet": set_(run, checkpoint, "quiet", "--edit", f"{P0}:ablate", "--edit", f"{C0}:ablate"),
            "loud": set_(run, checkpoint, "loud", "--vector", "stripes", "--description", "a [bold] word " * 9),
            "n" * 64: set_(run, checkpoint, "n" * 64, "--edit", f"{P0}:ablate"),
        }
        found = run("policy", "list", checkpoint, "--json").document
        assert [f["name"] for f in found] == sorted(made)
        for f in found:
            assert f["sha256"] == made[f["name"]]["sha256"] and f["policy"] == stored(checkpoint)[f["name"]]
            assert run("policy", "show", checkpoint, f["name"], "--json").document == f
        listed = run("policy", "list", checkpoint).out
        lines = {line.split()[0]: line.split() for line in listed.splitlines()}
        assert lines["quiet"] == ["quiet", made["quiet"]["sha256"][:12], "2", "0", "-"]
        assert lines["loud"] == ["loud", made["loud"]["sha256"][:12], "0", "1", *("a [bold] word".split() * 9)]
        assert "n" * 64 in lines

    def test_a_narrow_terminal_cuts_nothing(
        self, run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        set_(run, checkpoint, "n" * 64, "--edit", f"{P0}:ablate", "--description", "word " * 20)
        monkeypatch.setenv("COLUMNS", "30")
        list_policies(checkpoint)
        (_, line) = capsys.readouterr().out.splitlines()
        assert "n" * 64 in line and line.split()[-20:] == ["word"] * 20

    def test_a_vectors_numbers_count_in_the_digest(self, run: Run, checkpoint: Path) -> None:
        first = set_(run, checkpoint, "loud", "--vector", "stripes")["sha256"]
        save_vector(checkpoint, vector("stripes", checkpoint, 0.0), force=True)
        (found,) = run("policy", "list", checkpoint, "--json").document
        assert found["sha256"] != first
        assert engine(checkpoint).policies.rules["loud"].sha256 == found["sha256"]


def test_remove(run: Run, checkpoint: Path, image: Path) -> None:
    set_(run, checkpoint, "quiet", "--edit", f"{P0}:ablate")
    set_(run, checkpoint, "loud", "--edit", f"{P0}:scale=3")
    ran = run("policy", "remove", checkpoint, "quiet")
    assert ran.code == 0 and ran.out == "Policy quiet removed.\n" and list(stored(checkpoint)) == ["loud"]
    refused(run("policy", "remove", checkpoint, "quiet"), "no policy 'quiet'", "loud")
    refused(run("policy", "remove", checkpoint, "lod"), "Did you mean loud?")
    refused(run("steer", image, "--ckpt", checkpoint, "--policy", "quiet"), "quiet")


class TestInForce:
    def test_steer_acts_by_it(self, run: Run, checkpoint: Path, image: Path) -> None:
        set_(run, checkpoint, "loud", "--edit", f"{P0}:scale=5", "--vector", "stripes=-2")
        by_name = steered(run, checkpoint, image, "--policy", "loud")
        assert by_name == steered(run, checkpoint, image, "--edit", f"{P0}:scale=5", "--vector", "stripes=-2")
        assert any(abs(change["change"]) > 1e-2 for change in by_name)

    def test_a_server_acts_by_it(self, run: Run, checkpoint: Path) -> None:
        made = set_(run, checkpoint, "loud", "--edit", f"{P0}:scale=5", "--vector", "stripes=-2")
        named = reply(engine(checkpoint), {"steer": {"policies": ["loud"]}})
        by_hand = {
            "edits": [{"feature": P0, "mode": "scale", "value": 5.0}],
            "vectors": [{"name": "stripes", "strength": -2.0}],
        }
        served = engine(checkpoint, default_policies=["loud"])
        for found in (named, reply(served, {})):
            assert found["answer"]["policies"] == ["loud"] and found["answer"]["source"] == "steered"
            assert found["steered"]["changes"] == reply(engine(checkpoint), {"steer": by_hand})["steered"]["changes"]
        rule = served.policies.rules["loud"]
        assert rule.sha256 == made["sha256"] and rule.mode == "default"

    def test_a_condition(self, run: Run, checkpoint: Path, image: Path, tmp_path: Path) -> None:
        for name, bound in (("always", -1e6), ("never", 1e6)):
            document = {
                "edits": [{"feature": P0, "mode": "scale", "value": 5.0}],
                "when": {"feature": P1, "op": ">", "value": bound},
            }
            (tmp_path / "p.json").write_text(json.dumps(document))
            set_(run, checkpoint, name, "--file", tmp_path / "p.json")
        always, never = (steered(run, checkpoint, image, "--policy", name) for name in ("always", "never"))
        assert always == steered(run, checkpoint, image, "--edit", f"{P0}:scale=5")
        assert all(change["change"] == 0 for change in never)


class TestAfterARewrite:
    """A policy means something for the partition that it was made for, and no other."""

    def test_what_was_made_before_is_refused(self, run: Run, again: Path, image: Path) -> None:
        for words in (("list",), ("show", "first")):
            refused(run("policy", words[0], again, *words[1:]), "was made for the partition", "make it again")
        refused(run("steer", image, "--ckpt", again, "--policy", "first"), "partition", "first")
        with pytest.raises(CheckpointError, match="partition"):
            engine(again)

    def test_shown_documents_stay_bound(self, run: Run, checkpoint: Path, again: Path, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_text(run("policy", "show", checkpoint, "first").out)
        options = ("policy", "set", again, "first", "--file", tmp_path / "p.json")
        before = (again / "policies.json").read_bytes()
        refused(run(*options), "p.json", "was made for the partition")
        assert (again / "policies.json").read_bytes() == before

    def test_they_can_be_made_again_one_by_one(self, run: Run, again: Path, image: Path) -> None:
        ran = run("policy", "set", again, "first", "--edit", f"{P0}:scale=5", "--json")
        assert ran.code == 0 and ran.document["replaced"] is True
        assert "note:" in ran.err and "second" in ran.err and "partition" in ran.err
        refused(run("policy", "list", again), "second")
        ran = run("policy", "set", again, "second", "--edit", f"{P1}:ablate")
        assert ran.code == 0 and ran.err == ""
        assert sorted(stored(again)) == ["first", "second"]
        expected = steered(run, again, image, "--edit", f"{P0}:scale=5")
        assert steered(run, again, image, "--policy", "first") == expected

    def test_they_can_be_removed(self, run: Run, again: Path) -> None:
        for name in ("first", "second"):
            assert run("policy", "remove", again, name).code == 0
        assert run("policy", "list", again, "--json").document == []
        engine(again)


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_stored(self, checkpoint: Path) -> Any:
        yield
        assert not (checkpoint / "policies.json").exists()

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "../up", "ä", "x" * 65, "a\n"], ids=repr)
    def test_a_name_that_is_none(self, run: Run, tmp_path: Path, name: str) -> None:
        refused(
            run("policy", "set", tmp_path / "no checkpoint", name, "--edit", f"{P0}:ablate"),
            "A policy cannot be named", "64 letters",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], ["would change nothing", "--edit"]),
            (["--description", "nothing"], ["would change nothing"]),
            (["--edit", "nonsense"], ["'nonsense' is no edit"]),
            (["--edit", f"{P0}:paint"], ["mode", "paint"]),
            (["--edit", f"{P0}:set"], ["needs a value"]),
            (["--edit", f"{P0}:ablate=2"], ["takes no value"]),
            (["--edit", f"{P0}:scale=nan"], ["not a number"]),
            (["--edit", f"{P0}:scale=1@box=1,0,0,1"], ["no box"]),
            (["--edit", f"{SECOND}/P99:ablate"], ["P99", "does not exist"]),
            (["--edit", "blocks.1.mlp.fc3/P0:ablate"], ["no split layer", SECOND]),
            (["--edit", f"{P0}:ablate", "--edit", f"{P0}:scale=2"], ["Two edits", P0]),
            (["--edit", f"{P0}:ablate@cls"], ["class"]),
            (["--edit", f"{P0}:add=1e39"], ["float32"]),
            (["--edit", f"{P0}:ablate", "--description", "\udcff"], ["not Unicode"]),
            (["--vector", "stripe"], ["no vector 'stripe'", "Did you mean stripes?"]),
            (["--vector", "watermark"], ["no vector 'watermark'", "There are stripes"]),
            (["--vector", "stripes=much"], ["not a number"]),
            (["--vector", "=2"], ["is no vector"]),
        ],
        ids=str,
    )
    def test_bad_options(self, run: Run, checkpoint: Path, options: list[str], said: list[str]) -> None:
        refused(run("policy", "set", checkpoint, "quiet", *options), *said)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "cannot be used"),
            ("[]", "does not hold a JSON object"),
            ("{} {}", "cannot be used"),
            ("{}", "would change nothing"),
            ('{"edits": null}', "are not a list"),
            ('{"edits": {}}', "are not a list"),
            ('{"vectors": "stripes"}', "are not a list"),
            ('{"edits": [], "edits": []}', "stands twice"),
            ('{"edits": [NaN]}', "NaN"),
            ('{"edits": ["ablate"]}', "edits.0"),
            ('{"vectors": [1]}', "vectors.0"),
            ('{"vectors": [{"name": "stripes", "strength": "1"}]}', "valid number"),
            ('{"edits": [{"feature": "x", "mode": "ablate", "more": 1}]}', "more"),
            ('{"policies": ["a"], "edits": [{"feature": "x", "mode": "ablate"}]}', "policies"),
            ('{"vectors": [{"layer": "' + SECOND + '", "vector": [1.0, 2.0]}]}', "32"),
            ('{"partition_sha256": 5, "vectors": [{"name": "stripes"}]}', "was made for the partition"),
            ('{"description": "\\ud800", "vectors": [{"name": "stripes"}]}', "not Unicode"),
            ("[" * 100_000, "nested"),
        ],
        ids=lambda text: text[:40],
    )
    def test_files(self, run: Run, checkpoint: Path, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "p.json").write_text(text)
        refused(run("policy", "set", checkpoint, "quiet", "--file", tmp_path / "p.json"), said)

    def test_files_that_are_none(self, run: Run, checkpoint: Path, tmp_path: Path) -> None:
        refused(run("policy", "set", checkpoint, "quiet", "--file", tmp_path / "no.json"), "no.json", "cannot be read")
        refused(run("policy", "set", checkpoint, "quiet", "--file", tmp_path), "cannot be read")
        (tmp_path / "p.json").write_bytes(b"\xff")
        refused(run("policy", "set", checkpoint, "quiet", "--file", tmp_path / "p.json"), "UTF-8")

    def test_no_checkpoint(self, run: Run, tmp_path: Path) -> None:
        none = tmp_path / "none"
        for words in (
            ["list", none],
            ["show", none, "a"],
            ["remove", none, "a"],
            ["set", none, "a", "--edit", "x/P0:ablate"],
        ):
            refused(run("policy", *words), "is not a directory")


def test_unknown_policies(run: Run, checkpoint: Path, image: Path) -> None:
    set_(run, checkpoint, "quiet", "--edit", f"{P0}:ablate")
    refused(run("policy", "show", checkpoint, "quite"), "no policy 'quite'", "Did you mean quiet?")
    refused(run("policy", "show", checkpoint, "loud"), "no policy 'loud'", "There are quiet.")
    refused(run("steer", image, "--ckpt", checkpoint, "--policy", "quite"), "quite", "quiet")


@pytest.mark.parametrize(
    "text", ["", "{", '{"format_version": 1}', '{"format_version": 1, "policies": {"a": {}}}', "\udcff"]
)
def test_a_damaged_file_stays_as_it_is(run: Run, checkpoint: Path, text: str) -> None:
    file = checkpoint / "policies.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = file.read_bytes()
    for words in (["list"], ["show", "a"], ["remove", "a"], ["set", "a", "--edit", f"{P0}:ablate"]):
        refused(run("policy", words[0], checkpoint, *words[1:]), "policies.json is damaged")
    assert file.read_bytes() == before


def test_a_stored_policy_that_cannot_be_used(run: Run, checkpoint: Path) -> None:
    """Written by hand: named as it is, and taken out again."""
    digest = manifest_of(checkpoint).partition_sha256
    save_policy(checkpoint, "odd", {"partition_sha256": digest, "edits": [{"feature": P0, "mode": "paint"}]})
    refused(run("policy", "list", checkpoint), "odd")
    assert '"paint"' in run("policy", "show", checkpoint, "odd").out
    assert run("policy", "remove", checkpoint, "odd").code == 0


def test_code_that_is_not_trusted(run: Run, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(
        "import timm\ndef build(**args):\n    return timm.create_model('vit_tiny_patch16_224', **args)\n"
    )
    elude.rewrite(
        vit.base, pictures, out=tmp_path / "c", layers=[SECOND], subunits=4, concepts=4, tokens=12, max_images=6,
        data_config=VIT_DATA, factory=f"{tmp_path / 'build.py'}:build", model_args=VIT_ARGS,
    )  # fmt: skip
    options = ("policy", "set", tmp_path / "c", "quiet", "--edit", f"{P0}:ablate")
    refused(run(*options), "--trust-factory")
    assert run(*options, "--trust-factory").code == 0 and list(stored(tmp_path / "c")) == ["quiet"]
