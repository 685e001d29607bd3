"""What the rest of the package stands on: files, figures, the allocator. Nothing here knows what a model is."""
