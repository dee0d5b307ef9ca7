"""torch, GPUs, precision and communication, from the facts of msmil.engine.doctor.torch_child."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from msmil.engine.doctor.check import Check, broken, ok, warning
from msmil.engine.doctor.child import Answer
from shards.files import human_bytes

Facts = Mapping[str, Any]

_PAIR: Final = "pip install torch and torchvision of the versions in constraints.txt, both from the same index"
_ASK: Final = "see what `python -m msmil.engine.doctor.torch_child` says"
_FREE: Final = 0.8  # share of a GPU's memory that is free where nobody else uses it


def check_torch(answer: Answer, *, driver: str | None, visible: str | None) -> Iterator[Check]:
    """Lines about torch and what it reaches; where the child ended, a line says so and is the last.

    Args:
        answer: of the child.
        driver: what nvidia-smi says of GPUs and driver in one line; None where there is no nvidia-smi.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    facts = answer.facts
    for stage, name, line in _STAGES:
        if stage not in facts:
            yield broken(name, answer.failure or "no answer", _PAIR if stage in ("torch", "torchvision") else _ASK)
            return
        if line is not None:
            yield line(facts)
        elif facts["num_gpus"]:
            yield from _gpus(facts, driver)
        else:
            yield _no_gpu(facts, driver, visible)


def _torch(facts: Facts) -> Check:
    cuda = facts["torch_cuda"]
    return ok("torch", f"{facts['torch']}, {'built for the CPU alone' if cuda is None else f'built for CUDA {cuda}'}")


def _torchvision(facts: Facts) -> Check:
    found = facts["torchvision"]
    if "error" in found:
        return broken("torchvision", f"does not fit torch {facts['torch']} ({found['error']})", _PAIR)
    return ok("torchvision", f"{found['value']} fits torch")


def _tensorboard(facts: Facts) -> Check:
    found = facts["tensorboard"]
    if "error" in found:
        fix = "pip install --force-reinstall tensorboard"
        return broken("TensorBoard", f"cannot be imported ({found['error']})", fix)
    return ok("TensorBoard", found["value"])


def _training(facts: Facts) -> Check:
    found = facts["training"]
    if "error" in found:
        fix = "mend the packages above, or install msmil into an empty venv"
        return broken("training code", f"cannot be imported ({found['error']})", fix)
    return ok("training code", "can be imported")


def _gloo(facts: Facts) -> Check:
    found = facts["gloo"]
    if "error" in found:
        fix = "see that processes reach each other on 127.0.0.1 (firewall, /etc/hosts), or set GLOO_SOCKET_IFNAME=lo"
        return broken("gloo", f"processes cannot sum over the loopback ({found['error']})", fix)
    return ok("gloo", f"{found['value']} sum over the loopback")


def _gpus(facts: Facts, driver: str | None) -> Iterator[Check]:
    found = facts.get("gpus", {"error": "no answer"})
    if "error" in found:
        fix = "see nvidia-smi; update the driver, or install the torch that is built for it"
        yield broken("GPUs", f"{facts['num_gpus']} cannot be used ({found['error']}); {driver}", fix)
        return
    for index, gpu in enumerate(found["value"]):
        text = f"{gpu['name']}, {human_bytes(gpu['free_bytes'])} of {human_bytes(gpu['total_bytes'])} free"
        if gpu["free_bytes"] < _FREE * gpu["total_bytes"]:
            fix = f"see who uses it with nvidia-smi, or leave GPU {index} out with CUDA_VISIBLE_DEVICES"
            yield warning(f"GPU {index}", f"{text}: something else uses it", fix)
        else:
            yield ok(f"GPU {index}", text)
    if driver is not None:
        yield ok("GPU driver", driver)
    yield _nccl(facts)


def _no_gpu(facts: Facts, driver: str | None, visible: str | None) -> Check:
    cpu = "training uses CPU ranks"
    if driver is None:
        fix = "use a machine with an NVIDIA GPU and its driver for real data; phantoms and tests need none"
        return warning("GPUs", f"none, and no nvidia-smi: {cpu}", fix)
    if visible is not None:
        fix = "unset CUDA_VISIBLE_DEVICES, or name the GPUs that this training may use"
        return warning("GPUs", f"CUDA_VISIBLE_DEVICES={visible} hides them ({driver}): {cpu}", fix)
    if facts["torch_cuda"] is None:
        return broken("GPUs", f"torch is built for the CPU alone, but there are GPUs ({driver})", _PAIR)
    fix = f"update the driver to one for CUDA {facts['torch_cuda']}, or install a torch that is built for yours"
    return broken("GPUs", f"nvidia-smi names them ({driver}), torch cannot use them", fix)


def _nccl(facts: Facts) -> Check:
    found = facts.get("nccl", {"error": "no answer"})
    if "error" not in found:
        return ok("NCCL", f"{found['value']} sum over GPUs")
    fix = "run it with NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 avoid broken links"
    make = broken if facts["num_gpus"] > 1 else warning  # a single GPU trains without it
    return make("NCCL", f"GPUs cannot sum ({found['error']})", fix)


def _bf16(facts: Facts) -> Check:
    gpus = facts.get("gpus", {}).get("value", [])
    without = sorted({gpu["name"] for gpu in gpus if not gpu["bf16"]})
    if without:
        return warning("bf16", f"{', '.join(without)} has no bf16 units", "set train.precision: fp16 or fp32")
    if "error" in facts["bf16"]:
        return broken("bf16", f"does not work ({facts['bf16']['error']})", "set train.precision: fp32")
    if gpus:
        return ok("bf16", "works on every GPU")
    if facts["bf16"]["value"] is False:
        return ok("bf16", "works on the CPU, which has no instructions for it: no faster than fp32")
    return ok("bf16", "works on the CPU")


# what the child tells, in its order, and the line it makes
_STAGES: Final[tuple[tuple[str, str, Callable[[Facts], Check] | None], ...]] = (
    ("torch", "torch", _torch),
    ("torchvision", "torchvision", _torchvision),
    ("tensorboard", "TensorBoard", _tensorboard),
    ("training", "training code", _training),
    ("gloo", "gloo", _gloo),
    ("num_gpus", "GPUs", None),
    ("bf16", "bf16", _bf16),
)


def driver_line(out: str) -> str | None:
    """One line of what `nvidia-smi --query-gpu=name,driver_version --format=csv,noheader` printed; None for nothing.

    >>> driver_line("NVIDIA A100, 550.54\\nNVIDIA A100, 550.54\\n")
    '2 x NVIDIA A100, driver 550.54'
    """
    rows = [line.rpartition(",") for line in out.splitlines() if "," in line]
    if not rows:
        return None
    names = {name.strip() for name, _, _ in rows}
    return f"{len(rows)} x {' and '.join(sorted(names))}, driver {rows[0][2].strip()}"
