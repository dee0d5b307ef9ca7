"""Reading other people's checkpoints: tensors pass, what stands beside them is inert, nothing is ever executed."""

from __future__ import annotations

import collections
import pathlib
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from msmil.models.published.reading import read_published
from shards.errors import UserError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}


def saved(folder: Path, content: object, name: str = "file.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def rewritten(source: Path, target: Path, change: Any, **options: Any) -> Path:
    """The torch file with its pickle changed."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", **options) as after:
        for name in before.namelist():
            data = before.read(name)
            after.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return target


class Runs:
    """Reading it with pickle runs a command."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return self.arguments[0], tuple(self.arguments[1:])


def test_a_bare_state_dict(tmp_path: Path) -> None:
    file = read_published(saved(tmp_path, STATE))
    assert file.tensors.keys() == STATE.keys()
    assert all(torch.equal(file.tensors[key], value) for key, value in STATE.items())
    assert file.beside == {}


def test_what_published_files_hold_beside_tensors_is_inert(tmp_path: Path) -> None:
    content = {
        "model": collections.OrderedDict(STATE),
        "epoch": 3,
        "auroc": np.float64(0.75),
        "f1": np.float32(0.5),
        "bacc": np.int64(2),
        "best": np.bool_(True),
        "label": np.str_("Mass"),
        "dir_path": pathlib.PosixPath("/a/b"),
        "config": {"model": {"name": "x"}},
    }
    file = read_published(saved(tmp_path, content))
    assert file.tensors.keys() == STATE.keys()
    expected = {"epoch": 3, "auroc": 0.75, "f1": 0.5, "bacc": 2, "best": True, "label": "Mass", "dir_path": "/a/b"}
    assert file.beside == {**expected, "config": {"model": {"name": "x"}}}
    assert {type(value) for value in file.beside.values()} == {int, float, bool, str, dict}


def test_files_written_with_numpy_1_name_its_modules_differently(tmp_path: Path) -> None:
    source = saved(tmp_path, {"model": STATE, "auroc": np.float64(0.75)})
    older = rewritten(source, tmp_path / "old.pth", lambda d: d.replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert read_published(older).beside == {"auroc": 0.75}


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "file.safetensors")
    assert read_published(tmp_path / "file.safetensors").tensors.keys() == STATE.keys()


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    file = read_published(saved(tmp_path, {"weight": torch.nn.Parameter(torch.zeros(2))}))
    assert not file.tensors["weight"].requires_grad


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
            (lambda mark: Runs(pathlib.os.system, f"touch {mark}"), "posix.system"),  # type: ignore[attr-defined]
            (lambda mark: Runs(subprocess.check_call, ["touch", str(mark)]), "check_call"),
            (lambda mark: Runs(bytearray, 10**13), "__builtin__.bytearray"),
        ],
    )
    def test_code_is_named_and_not_run(self, tmp_path: Path, make: Any, name: str) -> None:
        mark = tmp_path / "ran"
        file = saved(tmp_path, {"model": STATE, "extra": make(mark)})
        with pytest.raises(UserError, match=rf"refers to .*{name}.*would execute: refused"):
            read_published(file)
        assert not mark.exists()

    def test_names_put_together_at_run_time(self, tmp_path: Path) -> None:
        bomb = pickle.dumps(Runs(pathlib.os.system, "true"), protocol=4)  # type: ignore[attr-defined]
        file = rewritten(saved(tmp_path, STATE), tmp_path / "bomb.pth", lambda _: bomb)
        with pytest.raises(UserError, match=r"put together while it runs.*refused"):
            read_published(file)

    def test_torchscript(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("m/data.pkl", b"")
            archive.writestr("m/code/__torch__.py", b"import os")
        with pytest.raises(UserError, match=r"TorchScript program.*refused"):
            read_published(tmp_path / "m.pt")

    def test_a_zip_bomb(self, tmp_path: Path) -> None:
        source = saved(tmp_path, {"weight": torch.zeros(250_000)})
        small = rewritten(source, tmp_path / "s.pth", lambda d: d, compression=zipfile.ZIP_DEFLATED)
        assert small.stat().st_size < 5_000
        with pytest.raises(UserError, match="larger inside than outside"):
            read_published(small)

    def test_a_tensor_larger_than_the_file(self, tmp_path: Path) -> None:
        file = saved(tmp_path, {"weight": torch.zeros(1).expand(10**12)})
        with pytest.raises(UserError, match=r"claims \(1000000000000,\)"):
            read_published(file)

    def test_a_tensor_that_reaches_behind_its_storage(self, tmp_path: Path) -> None:
        source = saved(tmp_path, {"weight": torch.zeros(7)})
        longer = rewritten(source, tmp_path / "longer.pth", lambda d: d.replace(b"K\x07", b"K\xff"))
        with pytest.raises(UserError, match=r"is damaged|claims"):
            read_published(longer)

    def test_a_web_page(self, tmp_path: Path) -> None:
        (tmp_path / "b2.tar").write_text("\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>")
        with pytest.raises(UserError, match=r"b2\.tar: is a web page.*browser"):
            read_published(tmp_path / "b2.tar")

    @pytest.mark.parametrize("share", [0.3, 0.99])
    def test_a_truncated_file(self, tmp_path: Path, share: float) -> None:
        file = saved(tmp_path, {"weight": torch.zeros(1000)})
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
        with pytest.raises(UserError, match=r"truncated.*download the file again"):
            read_published(file)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "is empty"), (b"\x80\x02garbage", "no torch checkpoint"), (b"name,label\n1,0\n", "no torch checkpoint")],
    )
    def test_other_files(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_published(tmp_path / "file.pth")

    def test_a_damaged_pickle(self, tmp_path: Path) -> None:
        file = rewritten(saved(tmp_path, STATE), tmp_path / "cut.pth", lambda d: d[:-20])
        with pytest.raises(UserError, match="is damaged"):
            read_published(file)

    def test_a_truncated_safetensors_file(self, tmp_path: Path) -> None:
        save_file(STATE, tmp_path / "file.safetensors")
        whole = (tmp_path / "file.safetensors").read_bytes()
        (tmp_path / "file.safetensors").write_bytes(whole[:-5])
        with pytest.raises(UserError, match="no whole safetensors file"):
            read_published(tmp_path / "file.safetensors")

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"model": {"a": [torch.zeros(1)]}}])
    def test_no_state_dict(self, tmp_path: Path, content: Any) -> None:
        with pytest.raises(UserError, match=r"holds.*give a state dict, or a mapping with one under `model`"):
            read_published(saved(tmp_path, content))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            read_published(tmp_path / "none.pth")
        with pytest.raises(UserError, match="is a folder"):
            read_published(tmp_path)
