"""Load on a running server: what is sent and when, what came back, and what it comes to."""
