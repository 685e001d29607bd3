"""Unit 15, magnitude and direction: its exercises and predictions, and its bank of answers."""
