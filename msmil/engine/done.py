"""What a run folder has behind it, so that a repeated command does only what is missing."""

from __future__ import annotations

from msmil.config import Config
from msmil.engine.checkpoint_state import newest, read_state
from msmil.engine.evaluate import find_checkpoint
from msmil.engine.run_folder import RunFolder, read_results
from shards.types import Split


def is_trained(folder: RunFolder, config: Config) -> bool:
    """Whether the newest checkpoint is that of the last epoch."""
    found = newest(folder.checkpoints)
    return found is not None and read_state(found)[0].epoch >= config.train.epochs


def is_evaluated(folder: RunFolder, split: Split, fingerprint: str) -> bool:
    """Whether the metrics of a split are those of the best checkpoint on the data that it was trained on."""
    if not (folder.metrics / f"{split}.json").exists():
        return False
    results = read_results(folder, split)
    best = find_checkpoint(folder, "best", other_data=False).name
    return bool(results.get("checkpoint") == best and results.get("data_fingerprint") == fingerprint)
