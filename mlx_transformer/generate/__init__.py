"""Decoding, sampling, and figures of the text that was generated."""
