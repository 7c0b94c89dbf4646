"""Writes what a consumer receives to files."""
