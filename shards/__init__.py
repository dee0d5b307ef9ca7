"""Mammograms to tars to batches; knows nothing of models."""
