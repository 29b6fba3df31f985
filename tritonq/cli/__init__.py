"""Commands of `python -m tritonq` for a user's own model and images."""
