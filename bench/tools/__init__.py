"""The tools of the bench."""
