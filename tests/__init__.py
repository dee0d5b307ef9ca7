"""The tests. Two processes run them on two cores: with more threads each, libraries would wait for one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
