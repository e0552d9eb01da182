"""Arithmetic, one file per device."""
