"""Run a script as a user would, where torchvision may lack its compiled operators."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from vision_models import import_torchvision

if __name__ == "__main__":
    import_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
