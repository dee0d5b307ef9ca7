"""The parts of a report, each of one run, or of several side by side."""
