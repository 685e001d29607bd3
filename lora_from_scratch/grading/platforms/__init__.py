"""Autograder bundles for Gradescope and PrairieLearn, the program that runs in their containers, and LTI export."""
