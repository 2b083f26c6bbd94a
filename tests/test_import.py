"""Importing the package is cheap, and its names are found when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import elude_runtime


def loaded_after(code: str) -> set[str]:
    heavy = "torch timm torchvision pydantic pyarrow sklearn typer ts".split()
    script = f"import sys\n{code}\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    "code", ["import elude_runtime", "import elude_runtime; elude_runtime.__version__; dir(elude_runtime)"]
)
def test_importing_loads_neither_torch_nor_timm(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_schema_knows_no_torch() -> None:
    documents = ("request", "reply", "operations", "kserve", "json_text")
    imports = "; ".join(f"import elude_runtime.api.schema.{name}" for name in documents)
    assert loaded_after(imports) == {"pydantic"}


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_after("import elude_runtime.cli.app") & {"torch", "timm", "pyarrow"}


def test_serving_needs_no_server_and_no_offline_packages() -> None:
    assert not loaded_after("import elude_runtime.api.engine") & {"ts", "typer", "pyarrow", "sklearn"}


def test_names() -> None:
    for name in elude_runtime.__all__:
        assert getattr(elude_runtime, name) is not None
    assert set(elude_runtime.__all__) <= set(dir(elude_runtime))
    with pytest.raises(AttributeError, match="'steer'"):
        elude_runtime.steer  # noqa: B018
