"""What looks after the code itself: never imported by src."""
