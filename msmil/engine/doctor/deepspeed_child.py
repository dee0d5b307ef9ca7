"""`python -m msmil.engine.doctor.deepspeed_child`: can DeepSpeed be imported, and compile an operator."""

from __future__ import annotations

import importlib
import signal
import sys

from msmil.engine.doctor.child import tell


def main() -> None:
    """Tell what works; an exception is the answer to what does not."""
    # at the deadline: an operator that is being compiled gives its lock back, for which others would wait
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended at the deadline"))
    importlib.import_module("deepspeed")
    tell(imported=True)
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    # the one that CPU ranks need at once; on GPUs, one that needs a compiler alone
    name = "ShareMemCommBuilder" if accelerator.device_name() == "cpu" else "CPUAdamBuilder"
    accelerator.create_op_builder(name).load()
    tell(built=name.removesuffix("Builder"))


if __name__ == "__main__":
    main()
