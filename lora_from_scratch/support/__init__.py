"""Utilities for the rest of the package: files, figures, the allocator. Nothing here depends on a model."""
