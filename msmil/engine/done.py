"""What a run folder has behind it, so that a repeated command does only what is missing."""

from __future__ import annotations

import json
from typing import Any

from msmil.config import Config
from msmil.engine.checkpoint import load_checkpoint, newest
from msmil.engine.evaluate import find_checkpoint
from msmil.engine.run_folder import RunFolder
from shards.errors import UserError
from shards.types import Split


def is_trained(folder: RunFolder, config: Config) -> bool:
    """Whether the newest checkpoint is that of the last epoch."""
    found = newest(folder.checkpoints)
    return found is not None and load_checkpoint(found).state.epoch >= config.train.epochs


def is_evaluated(folder: RunFolder, split: Split, fingerprint: str) -> bool:
    """Whether the metrics of a split are those of the best checkpoint on the data that it was trained on."""
    if not (folder.metrics / f"{split}.json").exists():
        return False
    results = read_results(folder, split)
    best = find_checkpoint(folder, "best", other_data=False).name
    return bool(results.get("checkpoint") == best and results.get("data_fingerprint") == fingerprint)


def read_results(folder: RunFolder, split: Split) -> dict[str, Any]:
    """The content of metrics/<split>.json.

    Raises:
        UserError: it is missing or no JSON.
    """
    file = folder.metrics / f"{split}.json"
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", file=file, fix="remove it and evaluate the run again") from None
    return results
