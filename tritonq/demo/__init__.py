"""The main job as a program: `python -m tritonq demo`."""
