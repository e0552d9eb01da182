"""What is measured, never imported by the package or its tests."""
