"""What runs several methods side by side: the demo, the shootout, the capstone."""
