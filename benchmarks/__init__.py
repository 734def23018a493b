"""The project's own measurements: each prints ratios of one run on one machine (`make bench` writes RESULTS.md)."""
