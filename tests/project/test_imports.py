"""The layers of the code import downwards only, and importing the package asks for nothing it may not have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tritonq

ROOT = Path(__file__).parent.parent.parent

# Each module belongs to the first layer whose prefix fits; a module imports its own layer and later ones.
LAYERS = [
    (
        "tritonq.__main__",
        "tritonq.cli",
        "tritonq.report",
        "tritonq.plots",
        "tritonq.demo",
        "tritonq.perf",
        "tritonq.testing",
    ),
    ("tritonq.accuracy", "tritonq.torch_ao"),
    ("tritonq.prepare", "tritonq.deploy", "tritonq.calibration", "tritonq.distributed", "tritonq.acceleration"),
    ("tritonq.nn",),
    (
        "tritonq.qconfig",
        "tritonq.qconfig_mapping",
        "tritonq.qconfig_files",
        "tritonq.preset_mappings",
        "tritonq.recipes",
    ),
    (
        "tritonq.code_precision",
        "tritonq.fake_quantize",
        "tritonq.fake_quantize_base",
        "tritonq.fixed_point_fake_quantize",
        "tritonq.graphs",
        "tritonq.float_fake_quantize",
        "tritonq.rank_ranges",
        "tritonq.switched_quantizer",
        "tritonq.learned_base",
        "tritonq.learned_bits",
        "tritonq.learned_fake_quantize",
        "tritonq.paper_schemes",
        "tritonq.parameter_groups",
        "tritonq.torch_operators",
    ),
    ("tritonq.observers", "tritonq.functional", "tritonq.factory", "tritonq.outliers"),
    ("tritonq.backend",),
    ("tritonq.compiled",),
    ("tritonq.reference", "tritonq.kernels"),
    ("tritonq.grid", "tritonq.saved_grid"),
    (
        "tritonq.qparams",
        "tritonq.quantized_type",
        "tritonq.granularity",
        "tritonq.arithmetic",
        "tritonq.bins",
        "tritonq.process_group",
        "tritonq.torch_v1_qparams",
    ),
    (
        "tritonq.formats",
        "tritonq.version",
        "tritonq.warn_once",
        "tritonq.near_misses",
        "tritonq.targets",
        "tritonq.remember",
    ),
]
# The one place that may read torch.ao checkpoints, and the one that accelerates its modules.
TORCH_AO_READERS = {"tritonq.deploy.torch_ao", "tritonq.acceleration.torch_ao"}


def modules():
    for folder, package in (("tritonq", "tritonq"), ("kernels", "tritonq.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imported(module):
    """Every module that an import anywhere in the file names, inside functions too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer_of(module):
    for depth, prefixes in enumerate(LAYERS):
        if any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes):
            return depth
    return None


MODULES = dict(modules())


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    depth = layer_of(module)
    if module == "tritonq":
        return
    assert depth is not None, f"{module} belongs to no layer: add it to LAYERS"
    for name in imported(module):
        if name.startswith("tritonq."):
            target = layer_of(name)
            assert target is None or target >= depth, f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tritonq.kernels")])
def test_kernels_import_torch_triton_and_themselves(module):
    allowed = {"__future__", "torch", "triton", *sys.stdlib_module_names}
    for name in imported(module):
        assert name.split(".")[0] in allowed or name.startswith("tritonq.kernels"), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_torch_ao_is_not_imported(module):
    if module not in TORCH_AO_READERS:
        assert not [name for name in imported(module) if name.startswith("torch.ao")]


def run(code):
    """Return what the code prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_everything_on_pytorch_works_without_triton():
    code = BLOCK.format(names={"triton"}) + (
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import torch, tritonq\n"
        "layer = tritonq.nn.ConvBnReLU2d(3, 4, 3, qconfig=tritonq.get_qconfig())\n"
        "layer(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "try:\n"
        "    tritonq.fake_quantize_per_tensor_affine(torch.ones(2), 0.1, 0, -8, 7, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton package is not installed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('the missing kernels were not reported')\n"
    )
    run(code)


def test_no_extra_is_needed_to_import_and_train():
    extras = {"onnx", "onnxscript", "onnxruntime", "matplotlib", "tqdm", "sklearn", "PIL", "timm", "transformers"}
    run(
        BLOCK.format(names=extras) + "import torch, tritonq\n"
        "layer = tritonq.nn.Conv2d(3, 4, 3, qconfig=tritonq.get_qconfig())\n"
        "layer(torch.randn(2, 3, 8, 8)).sum().backward()\n"
    )


def test_importing_touches_no_device_and_no_kernel():
    run(
        "import sys, torch\n"
        "torch.cuda.init = torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(AssertionError('CUDA touched'))\n"
        "import tritonq\n"
        "assert not [name for name in sys.modules if name.startswith('tritonq.kernels')]\n"
    )


def test_importing_loads_what_every_script_needs_and_no_more():
    """Modules are counted, since time depends on the machine; the others come with the first name that needs them."""
    printed = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import tritonq\n"
        "print(*(set(sys.modules) - before))\n"
        "assert callable(tritonq.prepare_qat) and 'tritonq.prepare' in sys.modules\n"
        "assert callable(tritonq.testing.check_quantizer) and tritonq.deploy.load_metadata\n"
        "assert not hasattr(tritonq, 'no_such_name') and {*tritonq.__all__, 'deploy'} <= set(dir(tritonq))\n"
    )
    loaded = set(printed.split())
    assert len(loaded) <= 129, sorted(loaded)
    assert {name.split(".")[0] for name in loaded} == {"tritonq"}
    later = ("accuracy", "acceleration", "cli", "compiled", "deploy", "perf", "prepare", "report", "testing")
    assert not [name for name in loaded if name.startswith(tuple(f"tritonq.{part}" for part in later))]


def test_names_that_come_later_are_the_ones_that_type_checkers_see():
    source = ast.parse(MODULES["tritonq"].read_text())
    (typed,) = (node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    parts = {name for name, module in seen.items() if module == "tritonq"}
    assert {name: module for name, module in seen.items() if name not in parts} == tritonq._LATER
    assert parts <= tritonq._PARTS
    # Importing a submodule binds its name in the package, over whatever __getattr__ would have returned.
    assert not [name for name in tritonq._LATER if f"tritonq.{name}" in MODULES]
    assert {f"tritonq.{name}" for name in tritonq._PARTS} <= set(MODULES)
