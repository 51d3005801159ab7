"""Errors, files and parameter trees, for every package."""
