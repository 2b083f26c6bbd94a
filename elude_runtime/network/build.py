"""Building the base model: a timm name with its arguments, or a user's factory that travels with the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from elude_runtime.errors import ModelError, did_you_mean
from elude_runtime.network.conditions import refuse_compiled

# Arguments with which timm.create_model reads files or hosts; a checkpoint must not choose these.
_LOADING_ARGS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable"}
)
# What huggingface_hub raises for a file that it neither has nor gets (LocalEntryNotFoundError is the usual one).
_UNREACHABLE = frozenset(
    "LocalEntryNotFoundError OfflineModeIsEnabled RepositoryNotFoundError EntryNotFoundError HfHubHTTPError".split()
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CARRIED_LIMIT = 64 * 2**20  # bytes of a factory's files


def build_timm(name: str, args: Mapping[str, Any] | None = None, *, pretrained: bool = False) -> nn.Module:
    """timm.create_model in eval mode: a registered name with or without a tag, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    ModelError for unknown names and tags (closest given), arguments, weights that are not in the cache or do not fit.
    """
    base, tag = split_model_name_tag(name)
    if ":" not in name and not timm.is_model(base):
        hint = (
            (f" A model of the hub is named hf-hub:{name}." if name.count("/") == 1 else "")
            or did_you_mean(base, timm.list_models())
            or " `python -c 'import timm; print(timm.list_models())'` lists them."
        )
        raise ModelError(f"timm has no model {name!r}.{hint}")
    refused = sorted(_LOADING_ARGS & set(args or {}))
    if refused:
        raise ModelError(f"{', '.join(refused)} cannot be an argument of the model; weights come with --weights.")
    try:
        return timm.create_model(name, pretrained=pretrained, **dict(args or {})).eval()
    except Exception as error:  # timm, the hub client and the model's constructor raise anything
        if any(kind.__name__ in _UNREACHABLE for kind in type(error).__mro__):
            raise ModelError(
                f"{name} is not in the local hub cache, and the hub does not answer with it; check the name and the "
                "network, or give a file with --weights."
            ) from error
        if "pretrained tag" in str(error):
            known = timm.list_models(f"{base}.*", pretrained=True)
            hint = did_you_mean(name, known) or f" It has {', '.join(known[:5]) or 'none'}."
            raise ModelError(f"timm has no weights {tag!r} of {base}.{hint}") from error
        what = "its weights could not be loaded" if pretrained else "it could not be built"
        raise ModelError(f"{name}: {what} ({_one_line(error)}).") from error


class Factory:
    """FILE.py:FUNCTION, a function that returns the model without (or with) its weights."""

    def __init__(self, file: Path, function: str) -> None:
        self.file, self.function = file, function

    @classmethod
    def parse(cls, text: str) -> Factory:
        """From `FILE.py:FUNCTION`. ModelError when it is not that."""
        path, separator, function = text.rpartition(":")
        if not separator or not function.isidentifier() or not path.endswith(".py"):
            raise ModelError(f"--model-factory takes FILE.py:FUNCTION, not {text!r}.")
        if not Path(path).is_file():
            raise ModelError(f"The factory file {path} is not there.")
        return cls(Path(path).resolve(), function)

    def build(self, args: Mapping[str, Any] | None = None) -> tuple[nn.Module, list[Path]]:
        """(the model in eval mode, the files below the factory's folder that it opened, itself first).

        Those files travel with the checkpoint; they are found by watching what the function opens.
        """
        folder = self.file.parent
        try:
            with _own_modules(folder) as imported, _watch_opens(folder) as opened:
                model = self._call(dict(args or {}))
        except ModelError:
            raise
        except Exception as error:  # a user's code raises anything
            raise ModelError(
                f"The factory {self.file.name}:{self.function} failed: {type(error).__name__}: {_one_line(error)}."
            ) from error
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"The factory {self.file.name}:{self.function} returned a {type(model).__name__}, not an nn.Module."
            )
        refuse_compiled(model)
        carried = [self.file, *sorted({*opened, *imported} - {self.file})]
        return model.eval(), carried

    def _call(self, args: dict[str, Any]) -> Any:
        name = f"elude_factory_{uuid.uuid4().hex}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None:
            raise ModelError(f"{self.file} cannot be imported as Python.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and typing look their module up by name
        spec.loader.exec_module(module)
        function = getattr(module, self.function, None)
        if function is None:
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ModelError(f"{self.file.name} has no function {self.function!r}.{did_you_mean(self.function, known)}")
        return function(**args)


def carry_files(files: list[Path], root: Path, out: Path) -> list[str]:
    """Copy a factory's files to `out`, keeping their places below `root`; returns their relative names.

    ModelError when they are too large: weights belong in --weights, not in the factory.
    """
    total = sum(f.stat().st_size for f in files)
    if total > CARRIED_LIMIT:
        raise ModelError(
            f"The factory opens {total / 2**20:.0f} MiB of files, the limit is {CARRIED_LIMIT // 2**20}; let it "
            "build the architecture only and give the weights with --weights."
        )
    names = []
    for file in files:
        name = file.relative_to(root).as_posix()
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
        names.append(name)
    return names


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """How a state dict does not fit the model: "2 missing (a, b); 1 unknown (c)"; empty where it fits."""
    expected = model.state_dict()
    both = [n for n in expected if n in tensors]
    found = {
        "missing": [n for n in expected if n not in tensors],
        "unknown": [n for n in tensors if n not in expected],
        "of another shape": [n for n in both if expected[n].shape != tensors[n].shape],
        "of another type": [
            n for n in both if expected[n].is_floating_point() != tensors[n].is_floating_point()
            or (tensors[n].is_floating_point() and tensors[n].dtype not in _FLOATS)
        ],
    }  # fmt: skip
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in found.items()
        if names
    )


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict strictly, every tensor in its own floating-point type, bit for bit.

    Where the types differ (norms in float32, the rest in bfloat16), what the state dict does not hold takes the type of
    the model's first parameter. ModelError that names what does not fit.
    """
    problem = misfit(model, tensors)
    if problem:
        raise ModelError(f"{source} does not fit the model: {problem}; check the model's name and arguments.")
    types = {t.dtype for t in tensors.values() if t.is_floating_point()}
    first = next((tensors[n].dtype for n, _ in model.named_parameters() if n in tensors), None)
    if types:
        model.to(first if first in types else types.pop())
    if len(types) > 1:
        for name, own in model.state_dict(keep_vars=True).items():
            own.data = own.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors), strict=True)


def json_args(pairs: list[str]) -> dict[str, Any]:
    """`K=V` pairs as arguments; values are JSON where they parse, text otherwise."""
    args = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ModelError(f"--model-arg takes NAME=VALUE, not {pair!r}.")
        try:
            args[key] = json.loads(value)
        except ValueError:
            args[key] = value
    return args


@contextmanager
def _own_modules(folder: Path) -> Iterator[list[Path]]:
    """Import from `folder` as if for the first time: modules below it are forgotten before the block and after it, so
    that two factories with a helper of the same name do not get each other's. Fills in the files imported."""

    def take_out() -> dict[str, Any]:
        real = cache(os.path.realpath)  # of folders: thousands of modules lie in a few hundred
        return {n: sys.modules.pop(n) for n, m in list(sys.modules.items()) if _file_below(m, folder, real)}

    imported: list[Path] = []
    remembered = take_out()
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield imported
    finally:
        sys.path.remove(str(folder))
        imported += [p for m in take_out().values() if (p := _file_below(m, folder))]
        sys.modules.update(remembered)


def _file_below(module: Any, folder: Path, real: Callable[[str], str] = os.path.realpath) -> Path | None:
    """The module's file, symbolic links followed, where it is part of a factory in `folder`. real: of a folder."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str):
        return None
    path = os.path.join(real(os.path.dirname(file)), os.path.basename(file))
    path = os.path.realpath(path) if os.path.islink(path) else path
    return Path(path) if path.startswith(str(folder)) and _belongs(Path(path), folder) else None


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a file is part of a factory in `folder`: below it, and neither an installed package (a virtual
    environment often lies beside the factory) nor hidden (a home directory holds credentials)."""
    if not path.is_relative_to(folder):
        return False
    parts = path.relative_to(folder).parts
    if any(part.startswith(".") or part in ("site-packages", "dist-packages", "__pycache__") for part in parts):
        return False
    homes = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    return not any(home != folder and home.is_relative_to(folder) and path.is_relative_to(home) for home in homes)


class _watch_opens:
    """Collects the regular files below a folder that are opened for reading inside the block, compiled code aside."""

    _folder: Path | None = None
    _seen: set[Path]
    _installed = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def __enter__(self) -> list[Path]:
        cls = type(self)
        if not cls._installed:
            sys.addaudithook(cls._audit)  # audit hooks cannot be removed: one is installed, idle outside a block
            cls._installed = True
        cls._seen, cls._folder = set(), self.folder
        return self.files

    def __exit__(self, *_: object) -> None:
        cls = type(self)
        cls._folder = None
        self.files += [p for p in cls._seen if p.is_file()]

    @classmethod
    def _audit(cls, event: str, args: tuple) -> None:
        folder = cls._folder
        if folder is None or event != "open" or not isinstance(args[0], str | bytes):
            return
        cls._folder = None  # resolving a path may open files itself
        try:
            path = Path(args[0].decode() if isinstance(args[0], bytes) else args[0]).resolve()
            if _belongs(path, folder):
                cls._seen.add(path)
        finally:
            cls._folder = folder


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] if text else type(error).__name__
