"""Importing submissions downloaded from Canvas, Moodle and Gradescope, and matching them to the course's roster."""
