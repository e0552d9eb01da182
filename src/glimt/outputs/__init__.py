"""Stage 7: token ids become text."""
