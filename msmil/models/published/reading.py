"""Checkpoint files of others -> tensors, with nothing in the file being executed.

A torch file is a zip of raw tensors and one pickle, and a pickle is a program. Three gates stand before its tensors:
the zip's own table (nothing compressed, nothing larger than the file), the names that the pickle refers to (a fixed
list), and a first pass without memory (sizes). Only then it is read, with torch.load(weights_only=True).
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import UserError

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_TORCH: Final = frozenset(
    {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"}
    | {"_codecs.encode", "torch.Size", "torch.device", "collections.Counter", "__builtin__.set"}
    | {f"torch.{kind}Storage" for kind in _STORAGES}
)
_LARGEST_PICKLE_BYTES: Final = 64 * 2**20  # a published one has less than 1 MiB
_SCALAR: Final = re.compile(r"[fiu][1248]|b1|U\d{1,4}")
_AGAIN = "download the file again and compare its size with the one at its source"


@dataclass(frozen=True)
class PublishedFile:
    """What a file holds: its tensors by name, and what stands beside them (`epoch`, `config`, ..), inert."""

    name: str
    tensors: dict[str, Tensor]
    beside: dict[str, Any]


def read_published(source: str | Path | Mapping[str, Any]) -> PublishedFile:
    """Read a torch or safetensors file, or take what was read already.

    Args:
        source: a file, or its content: a state dict, or a mapping that has one under `model`.

    Raises:
        UserError: no such file; a web page; truncated; no checkpoint; refers to code; larger inside than outside.
    """
    if isinstance(source, Mapping):
        return _published_file("the state dict given", source)
    path = Path(source)
    try:
        with path.open("rb") as file:
            content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path, file)
    except FileNotFoundError:
        raise UserError("there is no such file", file=path, fix="name a downloaded checkpoint") from None
    except IsADirectoryError:
        raise UserError("is a folder", file=path, fix="name the checkpoint file in it") from None
    except SafetensorError as error:
        raise UserError(f"is no whole safetensors file ({error})", file=path, fix=_AGAIN) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, fix="check its permissions") from None
    return _published_file(str(path), content)


def _published_file(name: str, content: object) -> PublishedFile:
    if not isinstance(content, Mapping):
        fix = "give a state dict, or a mapping with one under `model`"
        raise UserError(f"holds a {type(content).__name__}", file=name, fix=fix)
    beside = dict(content)
    state = beside.pop("model") if isinstance(content.get("model"), Mapping) else beside
    if state is beside:
        beside = {}
    strange = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange or not state:
        what = f"holds no tensors under {', '.join(strange[:3])}" if strange else "holds no tensors"
        raise UserError(what, file=name, fix="give a state dict, or a mapping with one under `model`")
    return PublishedFile(name, {key: value.detach() for key, value in state.items()}, beside)


def _read_torch(path: Path, file: IO[bytes]) -> object:
    _check_zip(path, file)
    size_bytes = file.seek(0, 2)
    with torch.serialization.safe_globals(list(_inert())):
        _check_sizes(path, _load(path, file, "meta"), size_bytes)
        return _load(path, file, "cpu")


def _load(path: Path, file: IO[bytes], device: str) -> object:
    file.seek(0)
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        text = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint is damaged ({type(error).__name__}: {text})", file=path, fix=_AGAIN) from None


def _check_zip(path: Path, file: IO[bytes]) -> None:
    """Refuse what is no plain torch zip, and a pickle that refers to anything but tensors, paths and numbers."""
    start = file.read(512)
    try:
        with zipfile.ZipFile(file) as archive:
            _check_table(path, archive, file.seek(0, 2))
            [pickle] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            names = _referred(archive.read(pickle))
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise _no_zip(path, start) from None
    except Exception as error:  # an invalid pickle raises whatever its bytes lead to
        raise UserError(f"the checkpoint is damaged ({type(error).__name__})", file=path, fix=_AGAIN) from None
    refused = sorted(names - _TORCH - {name for _, name in _inert()})
    if refused:
        fix = "do not open it with other tools either, unless you trust its author; ask for a plain state dict"
        raise UserError(f"refers to {', '.join(refused[:5])}, which reading would execute: refused", file=path, fix=fix)


def _no_zip(path: Path, start: bytes) -> UserError:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        fix = "download it in a browser; large files of a drive ask to be confirmed first"
        return UserError("is a web page, not a checkpoint", file=path, fix=fix)
    if start.startswith(b"PK"):
        return UserError("the checkpoint is truncated: its end is missing", file=path, fix=_AGAIN)
    if not start:
        return UserError("is empty", file=path, fix=_AGAIN)
    fix = "give the file as released; one older than torch 1.6 must be saved again with a newer torch"
    return UserError("is no torch checkpoint (no zip)", file=path, fix=fix)


def _check_table(path: Path, archive: zipfile.ZipFile, size_bytes: int) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        fix = "give a state dict: torch.save(model.state_dict(), ..)"
        raise UserError("is a TorchScript program, which reading would execute: refused", file=path, fix=fix)
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len(set(names)) < len(names) or len({n.partition("/")[0] for n in names}) != 1:
        raise UserError("is no torch checkpoint (a zip of other things)", file=path, fix="give the file as released")
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    too_large = sum(entry.file_size for entry in entries) > size_bytes or pickles[0].file_size > _LARGEST_PICKLE_BYTES
    if packed or too_large:
        fix = "give the file as torch.save wrote it; do not open this one with other tools"
        raise UserError("is larger inside than outside (a zip bomb): refused", file=path, fix=fix)


def _referred(pickle: bytes) -> set[str]:
    """Names that a pickle refers to, found without running it."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL" or opcode.name.startswith("EXT"):
            names.add("names that are put together while it runs")
    return names


def _check_sizes(path: Path, content: object, size_bytes: int) -> None:
    """Refuse a tensor that claims more than the file holds (`content` was read without memory for tensors)."""
    open_values, seen = [content], set()
    while open_values:
        value = open_values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            open_values += value.values()
        elif isinstance(value, list | tuple):
            open_values += value
        elif isinstance(value, Tensor) and value.numel() * value.element_size() > size_bytes:
            fix = "do not use this file; it is not what torch.save writes"
            raise UserError(f"a tensor claims {tuple(value.shape)}, more than the file holds", file=path, fix=fix)


def _path(*parts: str) -> str:
    """In place of pathlib's classes: the path as text."""
    return "/".join(part.rstrip("/") for part in parts)


class _Kind:
    """In place of numpy.dtype: a type of number, or text."""

    def __init__(self, code: str, *_: object) -> None:
        if not _SCALAR.fullmatch(code):
            raise ValueError(f"numpy type {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _Kind, raw: bytes) -> float | int | bool | str:
    """In place of numpy's `scalar`: a plain number."""
    value: float | int | bool | str = np.frombuffer(raw, dtype=kind.order + kind.code, count=1)[0].item()
    return value


def _inert() -> tuple[tuple[Callable[..., Any], str], ...]:
    """(what is built instead, name in the pickle) of what published files hold beside tensors."""
    paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    return (
        *((_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in paths),
        *((_number, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
        (_Kind, "numpy.dtype"),
    )
