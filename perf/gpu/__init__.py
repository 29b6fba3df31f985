"""Everything that a first visit to a GPU should answer, in one command: ``python -m tritonq.perf.gpu``."""
