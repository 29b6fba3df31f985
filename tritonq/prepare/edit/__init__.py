"""Carry out the decisions on a model, with one editor that can undo them."""
