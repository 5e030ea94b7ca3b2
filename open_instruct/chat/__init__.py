"""Talking with a model: in the terminal."""
