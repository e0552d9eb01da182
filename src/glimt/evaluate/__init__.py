"""What users compare: answers against right ones, one setting against another."""
