"""Errors, files, parameter trees and text, for every package."""
