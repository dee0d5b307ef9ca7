"""Ranks that a launcher started find each other; one that does not come, or stops answering, is named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

_POLL_S: Final = (0.002, 0.1)  # at first, later


class Missing(Exception):  # noqa: N818 - what a check found, no error of ours
    """Ranks that did not answer in time; `str()` names them.

    Attributes:
        speaker: whether this rank is the one to say it: the first of those that are there.
    """

    def __init__(self, text: str, *, speaker: bool) -> None:
        super().__init__(text)
        self.speaker = speaker


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int
    device: str


class Meeting:
    """The ranks of a launcher and what they tell each other through torch's key-value store on rank 0's machine.

    Args:
        environment: holds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
        timeout_s: how long a rank is waited for.

    Raises:
        Missing: the store cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str], *, timeout_s: float) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.rank, self.world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.timeout_s = timeout_s
        address, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "29500"))
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent has a store already
        try:
            self.store: Any = TCPStore(
                address,
                port,
                self.world,
                is_master=self.rank == 0 and not agent,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            host = "the launcher" if agent else "rank 0"
            text = f"{host} does not answer at {address}:{port} within {timeout_s:g} s ({_first_line(error)})"
            raise Missing(text, speaker=True) from None

    def everybody(self, where: str, told: str = "-", *, timeout_s: float | None = None) -> list[str]:
        """Wait until all ranks are here, and return what each told.

        Raises:
            Missing: names the ranks that did not come in time.
        """
        keys = [f"msmil/{where}/{rank}" for rank in range(self.world)]
        wait_s, poll_s = timeout_s or self.timeout_s, _POLL_S[0]
        deadline_s = time.monotonic() + wait_s
        try:
            self.store.set(keys[self.rank], told)
            while not self.store.check(keys):
                if time.monotonic() > deadline_s:
                    raise self._missing(keys, wait_s)
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, _POLL_S[1])
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:  # DistNetworkError: rank 0 has ended, and has said why
            raise Missing(f"the store of rank 0 is gone ({_first_line(error)})", speaker=False) from None

    def _missing(self, keys: Sequence[str], wait_s: float) -> Missing:
        here = [self.store.check([key]) for key in keys]
        missing = [rank for rank, is_here in enumerate(here) if not is_here]
        text = f"{named(missing)} of {self.world} did not answer within {wait_s:g} s"
        return Missing(text, speaker=self.rank == here.index(True))

    def places(self, device: str) -> list[Place]:
        """Where every rank runs, in rank order; raises as `everybody`."""
        told = self.everybody("places", f"{socket.gethostname()} {os.getpid()} {device}")
        parts = [text.split(" ", 2) for text in told]
        return [Place(host, int(pid), device) for host, pid, device in parts]


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 3`, `ranks 1, 2, 3, 4, 5, ... (9 in all)`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f", ... ({len(ranks)} in all)" if len(ranks) > 5 else ""
    return f"ranks {', '.join(map(str, ranks[:5]))}{more}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
