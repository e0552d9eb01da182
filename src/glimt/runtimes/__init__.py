"""What runs a vision tower that was compiled to a file: one file per runtime."""
