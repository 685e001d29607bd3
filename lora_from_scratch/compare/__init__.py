"""Comparing methods with one another: the demo, the shootout, the capstone."""
