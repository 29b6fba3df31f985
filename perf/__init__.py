"""Measurements: cases, runner, tuner, pictures and code-generation report. Installed as ``tritonq.perf``."""
