"""One file per archive: what a user downloaded, read into source rows."""
