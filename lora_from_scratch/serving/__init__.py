"""Serving many adapters on one model."""
