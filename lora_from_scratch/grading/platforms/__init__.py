"""Autograder bundles for Gradescope and PrairieLearn, and what runs in their containers."""
