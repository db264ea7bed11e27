"""What this repository claims about speed and memory, one module a claim: `python -m benchmarks.NAME [--json]`."""
