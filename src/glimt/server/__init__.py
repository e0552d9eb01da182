"""Text to HTTP: one internal request, one file for each protocol that clients speak."""
