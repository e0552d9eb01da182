"""Stage 1: a request becomes token ids and pixels."""
