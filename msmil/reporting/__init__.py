"""Pictures of results, drawn once for every reader."""
