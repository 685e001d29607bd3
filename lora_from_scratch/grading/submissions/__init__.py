"""What was handed in: reading it, and putting it right by what was released."""
