"""Model families, one file each, found by scanning this folder."""
