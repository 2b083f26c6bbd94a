"""What SECURITY.md promises, each sentence against a real `elude serve` with the shipped configuration, and against
archives that somebody changed."""

from __future__ import annotations

import ast
import base64
import json
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

pytest.importorskip("ts")
from conftest import REPOSITORY, Rewritten
from hypothesis import given
from hypothesis import strategies as st
from support import FIRST, encoded, picture

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.checkpoint.policies import save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.archive_digest import archive_sha256, parse_expected
from elude_runtime.cli.server_process import session_members
from elude_runtime.cli.server_settings import read_properties
from elude_runtime.cli.torchserve import Server
from elude_runtime.errors import CheckpointError, EludeError, ServerError
from elude_runtime.package_files import package_directory, shipped_file

PNG = encoded(picture(1))
SECRETS = ("Traceback", 'File "', "site-packages", "root:", ".java", "Exception:")
REFUSED = (400, 401, 403)  # TorchServe says 400 where others say 401


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten) -> Path:
    """With everything beside the checkpoint that an archive carries: a policy, a vector, the feature table."""
    out = tmp_path_factory.mktemp("secured") / "ckpt"
    shutil.copytree(vit.path, out)
    partition = vit.model.manifest.partition_sha256
    direction = np.linspace(-1, 1, 32, dtype=np.float32)
    save_vector(out, StoredVector("tilt", FIRST, partition, "2026-01-01", direction, [], [], None, 1, 1))
    save_policy(out, "calm", {"partition_sha256": partition, "edits": [{"feature": f"{FIRST}/P0", "mode": "ablate"}]})
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """vit.mar; second.mar, which nobody asks to be served; tampered.mar, a bit of whose weights was flipped."""
    store = tmp_path_factory.mktemp("store")
    build_archive(checkpoint, store, name="vit")
    shutil.copyfile(store / "vit.mar", store / "second.mar")
    rewritten(store / "vit.mar", store / "tampered.mar", "checkpoint/model.safetensors", flipped(-1))
    return store


def flipped(place: int, bit: int = 0) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        return bytes(changed)

    return change


def rewritten(archive: Path, out: Path, member: str, change: Callable[[bytes], bytes]) -> None:
    """A copy of an archive with one member changed, its checksum right again."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename == member else data)


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with Server(store, ["vit.mar"]) as running:
        running.wait_ready(240)
        yield running


class TestServer:
    """One server, as `elude serve` starts it: nothing is said but the model."""

    @pytest.mark.server
    @pytest.mark.parametrize(
        "path",
        ["predictions/vit", "predictions/vit/1.0/describe", "explanations/vit", "v1/models/vit:predict",
         "v2/models/vit/infer", "v2/models/vit/explain"],
    )  # fmt: skip
    def test_no_key_no_answer(self, server: Server, path: str) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, server.headers("management"), server.headers("API")):
            reply = httpx.post(f"{server.url}/{path}", headers=headers, content=PNG)
            assert reply.status_code in REFUSED and "Token" in reply.text
            assert "probability" not in reply.text and "checkpoint" not in reply.text

    @pytest.mark.server
    def test_the_inference_key_answers_and_opens_nothing_else(self, server: Server) -> None:
        key = server.headers()
        assert httpx.post(f"{server.url}/predictions/vit", headers=key, content=PNG).status_code == 200
        for url in (f"{server.management_url}/models", f"{server.management_url}/models/vit?customized=true",
                    f"{server.management_url}/token?type=management", f"{server.url}/models"):  # fmt: skip
            for headers in (key, {}):
                assert httpx.get(url, headers=headers).status_code in (*REFUSED, 404, 405), url

    @pytest.mark.server
    def test_keys_are_readable_by_their_owner_only(self, server: Server) -> None:
        assert server.run_dir.stat().st_mode & 0o777 == 0o700
        assert (server.run_dir / "key_file.json").stat().st_mode & 0o777 == 0o600
        keys = {server.token(purpose) for purpose in ("inference", "management", "API")}
        assert len(keys) == 3 and None not in keys
        logs = "".join(file.read_text(errors="replace") for file in (server.run_dir / "logs").iterdir())
        assert not [key for key in keys if key in logs]

    @pytest.mark.server
    def test_sockets_are_on_loopback_only(self, server: Server) -> None:
        """Inference, management, metrics and the two of gRPC; another address of this host refuses."""
        listening = [
            connection.laddr
            for process in session_members(server.pid, 0)
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        ports = {address.port for address in listening}
        assert len(ports) >= 5
        assert {address.ip.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
        others = [
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family == socket.AF_INET and not address.address.startswith("127.")
        ]
        for port, ip in ((port, ip) for port in ports for ip in others):
            with socket.socket() as client:
                client.settimeout(2)
                assert client.connect_ex((ip, port)) != 0, (ip, port)

    @pytest.mark.server
    @pytest.mark.parametrize("url", ["second.mar", "http://127.0.0.1:9/x.mar", "file:///etc/passwd", "../x.mar"])
    def test_no_model_comes_in_by_a_request(self, server: Server, url: str) -> None:
        key = server.headers("management")
        reply = httpx.post(f"{server.management_url}/models", params={"url": url, "initial_workers": 1}, headers=key)
        assert reply.status_code == 405
        assert self.models(server) == ["vit"]

    @pytest.mark.server
    def test_no_model_goes_by_a_request(self, server: Server) -> None:
        key = server.headers("management")
        for path in ("models/vit", "models/vit/1.0"):
            assert httpx.delete(f"{server.management_url}/{path}", headers=key).status_code == 405
        assert self.models(server) == ["vit"]

    def models(self, server: Server) -> list[str]:
        reply = httpx.get(f"{server.management_url}/models", headers=server.headers("management"))
        return [model["modelName"] for model in reply.json()["models"]]

    @pytest.mark.server
    def test_scaling_needs_the_management_key(self, server: Server) -> None:
        """`enable_model_api=false` leaves this one open to whoever holds that key; SECURITY.md says so."""
        url = f"{server.management_url}/models/vit?min_worker=1&max_worker=1"
        for headers in ({}, server.headers()):
            assert httpx.put(url, headers=headers).status_code in REFUSED
        assert httpx.put(url, headers=server.headers("management")).status_code == 202

    @pytest.mark.server
    def test_no_page_of_another_origin_may_read_a_reply(self, server: Server) -> None:
        origin = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
        for headers in (origin, {**origin, **server.headers()}):
            for reply in (
                httpx.options(f"{server.url}/predictions/vit", headers=headers),
                httpx.post(f"{server.url}/predictions/vit", headers=headers, content=PNG),
            ):
                assert not [name for name in reply.headers if name.startswith("access-control-")]

    @pytest.mark.server
    def test_errors_name_no_paths_and_no_code(self, server: Server) -> None:
        def ask(content: bytes, path: str = "predictions/vit", kind: str = "application/json") -> httpx.Response:
            headers = {**server.headers(), "Content-Type": kind}
            return httpx.post(f"{server.url}/{path}", headers=headers, content=content)

        up = "../../../../etc/passwd"
        image = {"b64": base64.b64encode(PNG).decode()}
        documents: list[Any] = [
            {"image": {"b64": "AAAA"}},
            {"image": image, "steer": {"policies": [up]}},
            {"image": image, "steer": {"vectors": [{"name": up, "coefficient": 1.0}]}},
            {"image": image, "explain": {"layers": [up]}},
            {"image": image, "activations": {"features": [up]}},
            {"image": {"url": f"file://{up}"}},
        ]
        replies = [ask(json.dumps(document).encode()) for document in documents]
        replies += [ask(b"{"), ask(PNG[:40], kind="image/png"), ask(PNG, f"predictions/vit/1.0/{up}")]
        replies += [ask(PNG, "predictions/..%2F..%2Fetc"), ask(PNG, "predictions/vit/9.9")]
        for reply in replies:
            assert 400 <= reply.status_code < 500, reply.text
            for secret in ("Traceback", 'File "', "site-packages", "root:", str(server.run_dir), ".java", "Exception:"):
                assert secret not in reply.text, reply.text


@pytest.mark.server
def test_a_tampered_archive_is_refused_and_the_server_says_why(store: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"tensors hash to .*; the file was changed or damaged"),
        Server(store, ["tampered.mar"], run_dir=tmp_path / "run") as server,
    ):
        server.wait_ready(240)


@dataclass(frozen=True)
class Unpacked:
    """The checkpoint as it lies in an archive."""

    path: Path
    sha256: str

    def open(self, **settings: Any) -> Engine:
        return Engine.open(self.path, ServingConfig(**settings), name="m", version="1")

    def changed(self, out: Path, file: str, change: Callable[[bytes], bytes]) -> Unpacked:
        shutil.copytree(self.path, out)
        (out / file).write_bytes(change((out / file).read_bytes()))
        return Unpacked(out, self.sha256)


@pytest.fixture(scope="module")
def unpacked(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(store / "vit.mar") as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("checkpoint/")])
    return Unpacked(folder / "checkpoint", read_manifest(folder / "checkpoint").checkpoint_sha256)


def test_what_is_expected_is_served_and_nothing_else(unpacked: Unpacked) -> None:
    assert unpacked.open(expected_checkpoint_sha256=unpacked.sha256).info.checkpoint_sha256 == unpacked.sha256
    with pytest.raises(CheckpointError, match=r"expects checkpoint 000000000000…, this one is .*; archive the right"):
        unpacked.open(expected_checkpoint_sha256="0" * 64)


@pytest.mark.parametrize("name", ["head.weight", f"elude.{FIRST}.partition", "elude.calibration_images"])
def test_a_bit_of_any_tensor_is_missed(unpacked: Unpacked, tmp_path: Path, name: str) -> None:
    """Weights, partition and calibration: no digest has to be known to find this."""
    data = (unpacked.path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    for number, place in enumerate((start, (start + end) // 2, end - 1)):
        bad = unpacked.changed(tmp_path / str(number), "model.safetensors", flipped(8 + length + place, 3))
        with pytest.raises(CheckpointError, match=r"tensors hash to|is damaged"):
            bad.open()


@given(place=st.floats(0, 0.999999), bit=st.integers(0, 7))
def test_no_bit_of_the_manifest_changes_unseen(
    unpacked: Unpacked, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    """With `expected_checkpoint_sha256`; without it, a changed label or mean is another checkpoint, which is served."""
    data = (unpacked.path / "elude.json").read_bytes()
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "elude.json").write_bytes(flipped(int(place * len(data)), bit)(data))
    try:
        found = read_manifest(folder)
    except CheckpointError:
        return
    assert found.checkpoint_sha256 != unpacked.sha256 or found == read_manifest(unpacked.path)


def test_without_an_expected_digest_another_manifest_is_another_checkpoint(unpacked: Unpacked, tmp_path: Path) -> None:
    other = unpacked.changed(tmp_path / "other", "elude.json", lambda data: data.replace(b'"ant"', b'"nat"'))
    assert other.open().info.checkpoint_sha256 != unpacked.sha256
    with pytest.raises(CheckpointError, match="expects checkpoint"):
        other.open(expected_checkpoint_sha256=unpacked.sha256)


@pytest.mark.parametrize("file", ["features.json", "policies.json", "vectors/tilt.json"])
def test_what_lies_beside_the_identity_is_in_the_archives_digest(
    store: Path, unpacked: Unpacked, tmp_path: Path, file: str
) -> None:
    """A damaged file is refused; one that was changed with care is in no digest of the checkpoint, but in the
    archive's, which `elude serve --expect` checks before anything is started."""
    with pytest.raises(CheckpointError, match="damaged"):
        unpacked.changed(tmp_path / "damaged", file, lambda data: data[:-9]).open()
    rewritten(store / "vit.mar", tmp_path / "vit.mar", f"checkpoint/{file}", lambda data: data + b"\n")
    expected = parse_expected([f"vit.mar={archive_sha256(store / 'vit.mar')}"])
    Server(store, ["other=vit.mar"], expect=expected)
    with pytest.raises(EludeError, match=r"vit\.mar has the digest .*, expected was"):
        Server(tmp_path, expect=expected)
    with pytest.raises(EludeError, match=r"Nothing was said of second\.mar"):
        Server(store, ["vit.mar", "second.mar"], expect=expected)
    for wrong in ("vit.mar", "vit.mar=12", f"../vit.mar={'0' * 64}"):
        with pytest.raises(EludeError, match="--expect takes"):
            parse_expected([wrong])


def test_a_policy_of_another_partition_is_refused(unpacked: Unpacked, tmp_path: Path) -> None:
    partition = read_manifest(unpacked.path).partition_sha256.encode()
    for number, file in enumerate(("policies.json", "vectors/tilt.json")):
        bad = unpacked.changed(tmp_path / str(number), file, lambda data: data.replace(partition, b"0" * 64))
        with pytest.raises(CheckpointError, match="was made for the partition 000000000000…"):
            bad.open()


def test_code_in_a_checkpoint_runs_only_when_trusted(unpacked: Unpacked, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    shutil.copytree(unpacked.path, tmp_path / "bad")
    (tmp_path / "bad" / "factory").mkdir()
    (tmp_path / "bad" / "factory" / "f.py").write_text(f"open({str(marker)!r}, 'w')\n")
    values = json.loads((tmp_path / "bad" / "elude.json").read_text())
    values["model"] |= {"kind": "factory", "file": "f.py", "function": "make", "files": {"f.py": "0" * 64}}
    (tmp_path / "bad" / "elude.json").write_text(json.dumps(values))
    bad = Unpacked(tmp_path / "bad", "")
    with pytest.raises(CheckpointError, match="carries code.*trust_factory: true"):
        bad.open()
    with pytest.raises(CheckpointError, match="was changed since the checkpoint was made"):
        bad.open(trust_factory=True)  # trusted is what was there when the checkpoint was made
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../vit", "a/b", "..", "/etc/passwd", "", "a\\b", "vit\n"])
def test_no_name_is_a_path(checkpoint: Path, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EludeError, match="must be of letters"):
        build_archive(checkpoint, tmp_path, name=name)
    document = {"partition_sha256": "0" * 64, "edits": []}
    vector = StoredVector(name, FIRST, "0" * 64, "2026", np.ones(2, np.float32), [], [], None, 1, 1)
    if name != "..":  # as a name of a vector it is ...json, in the folder of vectors
        with pytest.raises(EludeError, match="cannot be named"):
            save_policy(tmp_path, name, document)
        with pytest.raises(EludeError, match="cannot be named"):
            save_vector(tmp_path, vector)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_unpickled() -> None:
    """No module that unpickles is imported, and what could unpickle is told not to, each by its own argument."""
    forbidden = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    told = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    files = [*package_directory().rglob("*.py"), *(REPOSITORY / "handler").glob("*.py")]
    assert len(files) > 100
    seen = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & forbidden, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, file
            elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in {*told, "numpy.load"}:
                keyword, value = told[name]
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get(keyword) == str(value), file
                seen.add(name)
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"eval", "exec", "yaml.load", "yaml.unsafe_load"}, file
                if ast.unparse(node.func).startswith(("subprocess.", "os.")):
                    assert "shell" not in {k.arg for k in node.keywords}, file
    assert seen == set(told)


def test_no_archive_holds_a_pickle(store: Path) -> None:
    with zipfile.ZipFile(store / "vit.mar") as archive:
        names = archive.namelist()
        kinds = {Path(name).suffix for name in names}
        assert kinds <= {".py", ".json", ".safetensors", ".yaml", ".typed", ".md", ""}, kinds
        for name in names:
            assert not name.startswith(("/", "..")) and "/../" not in name
            assert archive.read(name)[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), name
            assert not zipfile.is_zipfile(archive.open(name)), name  # a torch.save is one, with a pickle in it


def test_the_shipped_configuration_is_the_closed_one() -> None:
    shipped = read_properties(shipped_file("deploy/config.properties"))
    assert shipped["allowed_urls"] == "" and shipped["enable_model_api"] == "false"
    assert shipped["enable_envvars_config"] == "false" and shipped["install_py_dep_per_model"] == "false"
    assert not [key for key in shipped if key.startswith("cors_")]
    assert ServingConfig().trust_factory is False


def test_the_java_libraries_are_those_that_are_written_down() -> None:
    """SECURITY.md names what TorchServe's front end bundles; another TorchServe makes that list wrong."""
    import ts

    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as jar:
        texts = {
            "Netty": (jar.read("META-INF/io.netty.versions.properties"), rb"netty-codec-http\.version=([\w.]+)"),
            "gRPC": (jar.read("io/grpc/internal/GrpcUtil.class"), rb"\b(1\.\d+\.\d+)\b"),
            "Log4j": (jar.read("META-INF/DEPENDENCIES"), rb"log4j-core:jar:([\d.]+)"),
            "SLF4J": (jar.read("META-INF/DEPENDENCIES"), rb"slf4j-api:jar:([\d.]+)"),
            "Groovy": (jar.read("META-INF/groovy-release-info.properties"), rb"ImplementationVersion=([\d.]+)"),
        }
    page = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    for name, (content, pattern) in texts.items():
        found = re.search(pattern, content)
        assert found and f"{name} {found[1].decode()}" in page, name
