"""Fewer bits for a weight, one file per format."""
