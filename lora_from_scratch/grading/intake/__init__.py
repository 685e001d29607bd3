"""Taking in downloads of submissions from Canvas, Moodle and Gradescope, matched to the course's roster."""
