"""RESULTS.md from the published logs."""
