"""Benchmarks of `msmil bench`: each prints a number beside its baseline, as a ratio, from one run."""
