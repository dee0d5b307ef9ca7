"""Drawing of synthetic mammograms: what they look like. Which of them are written, and where: shards.sources.phantom."""
