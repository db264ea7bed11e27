"""Prefixes that are found again: an index of token blocks, and the cache that keeps their pages."""
