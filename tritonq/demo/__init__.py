"""The demo, ``python -m tritonq demo``: train a small CNN, fine-tune it with QAT, deploy it, and compare."""
