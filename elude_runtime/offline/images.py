"""Image folders as batches: sorted files, timm's transform, unreadable images skipped, counted and named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elude_runtime.errors import ImagesError
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input

Progress = Callable[[str, int, int | None], None]  # (stage, newly done, total if known)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


def list_images(folder: Path, limit: int | None = None) -> list[Path]:
    """The image files below `folder`, sorted by path; with a limit, that many spread evenly over the list.

    ImagesError for a folder that is not there or holds none.
    """
    if not folder.is_dir():
        raise ImagesError(f"The image folder {folder} is not there.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ImagesError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}); give a folder of typical inputs.")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return files


@dataclass
class ImageReport:
    """What was met on the way: content hashes (first 16 bytes of SHA-256) and files skipped with the reason."""

    hashes: list[bytes] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class _Files(Dataset):
    def __init__(self, files: list[Path], config: DataConfig) -> None:
        self.files, self.transform = files, config.transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, bytes, str, str]:
        file = self.files[index]
        try:
            data = file.read_bytes()
            return to_input(decode_image(data), self.transform), image_hash(data), str(file), ""
        except (ImagesError, OSError) as error:
            return None, b"", str(file), str(error)


class ImageSource:
    """Images that can be read again and again, in the same batches each time: `[B, 3, H, W]` float32.

    From a folder or list of files, a tensor [N, 3, H, W], or an iterable of batches that can be iterated twice.
    """

    def __init__(
        self,
        images: Path | list[Path] | Tensor | Iterable[Tensor],
        config: DataConfig,
        *,
        batch_size: int = 25,
        workers: int = 0,
        limit: int | None = None,
    ) -> None:
        self.batch_size, self.workers, self.config = batch_size, workers, config
        self.limit = limit
        self.report = ImageReport()
        self._files: list[Path] | None = None
        self._tensors: Tensor | Iterable[Tensor] | None = None
        if isinstance(images, Path):
            self._files = list_images(images, limit)
        elif isinstance(images, list) and images and isinstance(images[0], Path):
            self._files = images[:limit]
        elif isinstance(images, Tensor):
            self._tensors = images[:limit]
        else:
            if iter(images) is images:
                raise ImagesError("The images are read twice: give a list of batches or a DataLoader, not a generator.")
            self._tensors = images  # type: ignore[assignment]

    @property
    def count(self) -> int | None:
        """Number of images where it is known beforehand."""
        if self._files is not None:
            return len(self._files)
        return len(self._tensors) if isinstance(self._tensors, Tensor) else None

    def batches(self) -> Iterator[Tensor]:
        """One pass over the images; fills `report` afresh. ImagesError when not a single image could be read."""
        self.report = report = ImageReport()
        total = 0
        for batch in self._file_batches(report) if self._files is not None else self._tensor_batches(report):
            total += len(batch)
            yield batch
        if not total:
            reason = f" The first: {report.skipped[0][0]}: {report.skipped[0][1]}" if report.skipped else ""
            raise ImagesError(f"None of the {len(report.skipped)} images could be read.{reason}")

    def _file_batches(self, report: ImageReport) -> Iterator[Tensor]:
        assert self._files is not None
        loader: Any = DataLoader(
            _Files(self._files, self.config), self.batch_size, num_workers=self.workers, collate_fn=list
        )
        pending: list[Tensor] = []
        for items in loader:
            for tensor, digest, file, problem in items:
                if tensor is None:
                    report.skipped.append((file, problem))
                else:
                    pending.append(tensor)
                    report.hashes.append(digest)
                if len(pending) == self.batch_size:
                    yield torch.stack(pending)
                    pending = []
        if pending:
            yield torch.stack(pending)

    def _tensor_batches(self, report: ImageReport) -> Iterator[Tensor]:
        source = self._tensors
        batches = source.split(self.batch_size) if isinstance(source, Tensor) else source
        for item in batches or ():
            batch = item[0] if isinstance(item, list | tuple) else item
            if batch.dim() != 4 or tuple(batch.shape[1:]) != tuple(self.config.input_size):
                expected = ", ".join(map(str, self.config.input_size))
                raise ImagesError(f"A batch of images has the shape [N, {expected}], not {list(batch.shape)}.")
            batch = batch[: None if self.limit is None else self.limit - len(report.hashes)]
            if not len(batch):
                return
            report.hashes += [image_hash(image.contiguous().numpy().tobytes()) for image in batch.cpu().float()]
            yield batch.float()


def image_hash(data: bytes) -> bytes:
    """Content hash of an image file (or of a preprocessed tensor's bytes): the first 16 bytes of its SHA-256."""
    return hashlib.sha256(data).digest()[:16]
