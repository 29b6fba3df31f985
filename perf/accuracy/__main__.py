"""Entry point: ``python -m tritonq.perf.accuracy``."""

import sys

from tritonq.perf.accuracy.command import main

sys.exit(main())
