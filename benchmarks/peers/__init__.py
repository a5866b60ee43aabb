"""Other libraries doing the same work: see `python -m benchmarks.peers`."""
