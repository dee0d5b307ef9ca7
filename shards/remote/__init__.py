"""Packed folders that lie elsewhere: read over http(s), S3 or any other fsspec file system, through a local cache."""
