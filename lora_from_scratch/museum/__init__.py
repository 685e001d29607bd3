"""Faults that real code had: each with the fault, mended, and a test that tells the two apart."""
