"""What a run found, as something to look at: one HTML file, Markdown, PNG plots."""
