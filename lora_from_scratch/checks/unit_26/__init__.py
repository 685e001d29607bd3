"""Unit 26: its exercises and predictions (`exercises`), and its bank of answers (`answers`)."""
