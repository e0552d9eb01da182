"""How the two demo models were made: their data, their training, their tests."""
