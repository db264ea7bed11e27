"""Requests that arrive while others run: how much an engine serves, and how long its users wait."""
