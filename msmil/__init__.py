"""Multi-scale attention multiple-instance learning on full-resolution mammograms."""

__version__ = "0.1.0"
