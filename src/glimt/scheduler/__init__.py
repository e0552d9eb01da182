"""Stage 2: which tokens of which sequences run in a step."""
