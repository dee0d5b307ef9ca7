"""The network: backbone, feature pyramid, MIL per scale, attention over scales."""
