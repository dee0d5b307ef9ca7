"""The engine: runs a network over data, on any number of ranks."""
