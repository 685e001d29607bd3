"""Unit 27: its exercises and predictions (`exercises`), and its bank of answers (`answers*`)."""
