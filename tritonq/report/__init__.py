"""Seeing what quantization does to a model: a table of its layers, and a page of measurements."""
