"""Other ways to run the same models, measured beside ours."""
