"""Stage 3: a step's plan becomes logits."""
