"""Generates tokens with a trained model."""
