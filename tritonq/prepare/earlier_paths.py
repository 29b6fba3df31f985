"""Keep the import paths of version 0.1.0, which pickled models name.

``torch.save(model)`` and ``pickle`` store the path of each class and function that they need to load the model again.
"""

from __future__ import annotations

import importlib
import sys

# Old name below tritonq.prepare: new one.
EARLIER_PATHS = {
    "dataflow": "record.dataflow",
    "eager": "edit.earlier_inputs",
    "forward_graph": "forwards.edited",
    "fuse": "edit.fuse",
    "inputs": "edit.earlier_inputs",
    "report": "decide.layer_records",
    "snapshot": "record.snapshot",
    "structure": "record.structure",
}


def register_earlier_paths() -> None:
    """Make the module paths of 0.1.0, in ``sys.modules``, import the modules that hold the same things now.

    ``tritonq.prepare.fuse`` is then the module ``tritonq.prepare.edit.fuse``, for example.
    """
    package = __name__.rpartition(".")[0]
    for old, new in EARLIER_PATHS.items():
        sys.modules[f"{package}.{old}"] = importlib.import_module(f"{package}.{new}")
