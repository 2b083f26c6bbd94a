"""The archive of the minimal handler: a checkpoint's base model without anything of ELUDe's, to be measured against."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.cli.archive import run_archiver
from elude_runtime.errors import CheckpointError
from elude_runtime.package_files import shipped_file


def build_minimal_archive(
    checkpoint: Path, out: Path, *, name: str, config: Path | None = None, trust_factory: bool = False
) -> Path:
    """Writes `out/NAME.mar` with the base weights, `model.json` (name, arguments, preprocessing, labels) and
    handler/minimal_handler.py. config: model-config.yaml; the shipped one by default.

    CheckpointError for a checkpoint that carries code nobody trusted, that is damaged, or whose model has no classes.
    """
    from safetensors.torch import save_file

    from elude_runtime.checkpoint.storage import read_tensors, split_tensors

    manifest = read_manifest(checkpoint)
    if manifest.output != "logits":
        raise CheckpointError(f"The model of {checkpoint} has no classes; give `elude bench serve` one with a head.")
    source = manifest.model
    spec: dict[str, Any] = {"name": source.name, "args": source.args}
    spec |= {"labels": manifest.labels, "data_config": manifest.data_config}
    if source.kind == "factory" and not trust_factory:
        raise CheckpointError(
            f"{checkpoint} carries code ({source.file}) that builds its model; read it, then give --trust-factory."
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".elude-archive-", dir=out) as folder:
        stage = Path(folder) / "stage"
        stage.mkdir()
        if source.kind == "factory":
            spec["factory"] = [source.file, source.function]
            (stage / "factory").symlink_to((checkpoint / "factory").resolve())
        base, _ = split_tensors(read_tensors(checkpoint))
        save_file(base, stage / "weights.safetensors")
        (stage / "model.json").write_text(json.dumps(spec), encoding="utf-8")
        settings = config or shipped_file("deploy/model-config.yaml")
        made = run_archiver(stage, Path(folder), name, "1.0", settings, "handler/minimal_handler.py")
        os.replace(made, out / f"{name}.mar")
    return out / f"{name}.mar"
