"""Multi-scale attention multiple-instance learning on full-resolution mammograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msmil.models.published.load import load_published

__all__ = ["__version__", "load_published"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`msmil.load_published` is imported when it is first used: it needs torch."""
    if name == "load_published":
        from msmil.models.published.load import load_published

        return load_published
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
