"""Drawing of synthetic mammograms. Which of them are written, and where: shards.sources.phantom."""
