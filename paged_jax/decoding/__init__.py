"""Decoding inside one XLA program: rows that know and cache tokens, one step for everything, loops over it."""
