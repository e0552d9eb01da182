"""The two small trained models and what they are made with."""
