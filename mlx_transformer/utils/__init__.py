"""Errors, files and trees that every package uses."""
