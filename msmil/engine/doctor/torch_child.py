"""`python -m msmil.engine.doctor.torch_child [CONFIG a.b=c ..]`: what torch says, one fact after the other.

What could crash or hang comes after what is told before it. Processes are forked before CUDA is touched.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

from msmil.engine.doctor.child import tell
from shards.errors import UserError

_PAIR: Final = 2
_WAIT_S: Final = 30.0


def main(arguments: Sequence[str]) -> None:
    """Tell all facts."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counting GPUs leaves CUDA untouched, so that we can fork
    import torch

    tell(torch=torch.__version__, torch_cuda=torch.version.cuda)
    tell(torchvision=_attempt(_torchvision))
    tell(tensorboard=_attempt(_tensorboard))
    tell(training=_attempt(_training))
    tell(gloo=_attempt(lambda: _all_reduce("gloo", _PAIR)))
    gpus = torch.cuda.device_count()
    tell(num_gpus=gpus)
    if gpus:
        tell(nccl=_attempt(lambda: _all_reduce("nccl", min(_PAIR, gpus))))
        tell(gpus=_attempt(_gpus))
    tell(bf16=_attempt(_bf16))
    if arguments:
        tell(experiment=_attempt(lambda: _experiment(arguments[0], arguments[1:])))


def _attempt(question: Callable[[], Any]) -> dict[str, Any]:
    """{"value": its answer}, or {"error": what went wrong in one line}."""
    try:
        return {"value": question()}
    except UserError as error:
        return {"error": error.thing, "fix": error.fix, "file": error.file}
    except Exception as error:  # whatever a library raises is the answer
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"}


def _torchvision() -> str:
    """Its compiled operators are there only where it was built for this torch."""
    import torch

    torchvision = importlib.import_module("torchvision")
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return str(torchvision.__version__)


def _tensorboard() -> str:
    import torch.utils.tensorboard  # noqa: F401

    return importlib.metadata.version("tensorboard")


def _training() -> None:
    import msmil.engine.train  # noqa: F401


def _all_reduce(backend: str, world: int) -> str:
    """A sum over processes of this machine, as in the first step of a training."""
    from torch import distributed

    if not distributed.is_available() or not getattr(distributed, f"is_{backend}_available")():
        raise RuntimeError("torch was built without it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(backend, rank, world, port, said)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_WAIT_S)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    if hung:
        raise RuntimeError(f"{world} processes did not meet within {_WAIT_S:.0f} s")
    if any(process.exitcode for process in ranks):
        raise RuntimeError(said.get() if not said.empty() else f"a process ended with {ranks[0].exitcode}")
    return f"{world} processes"


def _rank(backend: str, rank: int, world: int, port: int, said: Any) -> None:
    import torch
    from torch import distributed

    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_WAIT_S * 0.8),
        )
        number = torch.full((1,), rank + 1.0, device=device)
        distributed.all_reduce(number)
        assert number.item() == world * (world + 1) / 2
        distributed.destroy_process_group()
    except Exception as error:
        said.put(str(error).splitlines()[0])
        sys.exit(1)


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        torch.zeros(1, device=torch.device("cuda", index)).add_(1).item()  # kernels for this card are there
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append({"name": name, "free_bytes": free, "total_bytes": total, "bf16": bf16})
    return found


def _bf16() -> bool:
    """A bf16 product under autocast, on the CPU; gives whether the CPU has instructions for it."""
    import torch

    from msmil.engine.bf16 import compute_bf16, cpu_has_bf16

    compute_bf16()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    return cpu_has_bf16()


def _experiment(file: str, overrides: Sequence[str]) -> int:
    """All that `msmil train` would check before it starts; the number of ranks."""
    import torch

    from msmil.config_io import load_config
    from msmil.engine.environment import default_ranks
    from msmil.engine.preflight import check_experiment

    ranks = default_ranks(torch.cuda.device_count())
    check_experiment(load_config(file, overrides), ranks)
    return ranks


if __name__ == "__main__":
    main(sys.argv[1:])
