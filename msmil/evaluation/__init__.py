"""Predictions, classification metrics, their intervals and the results of a run."""
