"""The wheel and the sdist hold what they should, and the wheel works in an environment of its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

import pytest

import tritonq

ROOT = Path(__file__).parent.parent.parent
# Folder of the repository: folder of the wheel.
FOLDERS = {"tritonq": "tritonq", "kernels": "tritonq/kernels", "perf": "tritonq/perf"}
# What the wheel goes without: modules that only developers run, and what they read.
FOR_DEVELOPERS = (
    *(
        "perf/codegen*.py",
        "perf/disassembly.py",
        "perf/goals.py",
        "perf/plot.py",
        "perf/predict.py",
        "perf/codegen_budget.json",
    ),
    *("perf/README.md", "perf/PREDICTIONS.md", "perf/results/*", "perf/pictures/*", "perf/accuracy/*.jsonl"),
)

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files belong to the project")


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tracked():
    """Every file of the project: what git tracks or would, as it lies in the folder now."""
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    return sorted(name for name in set(names.split("\0")) if name and (ROOT / name).exists())


def copy_project(names, folder):
    """Copy files and links into a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """(wheel, sdist), built from a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    copy_project(tracked, source)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
    run([sys.executable, "-c", code], cwd=source)
    (wheel,), (sdist,) = (list((source / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel_files(built):
    with zipfile.ZipFile(built[0]) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def test_the_wheel_holds_every_module_and_data_file(wheel_files, tracked):
    expected = {
        FOLDERS[name.partition("/")[0]] + "/" + name.partition("/")[2]
        for name in tracked
        if name.partition("/")[0] in FOLDERS
        and not (ROOT / name).is_symlink()
        and not any(fnmatch(name, pattern) for pattern in FOR_DEVELOPERS)
    }
    assert set(wheel_files) == expected


def test_what_the_wheel_holds_imports_nothing_that_it_lacks(wheel_files):
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in wheel_files}
    for name in wheel_files:
        if name.endswith(".py"):
            folder = next(folder for folder in ("kernels", "perf", "tritonq") if name.startswith(FOLDERS[folder] + "/"))
            source = (ROOT / folder / name.removeprefix(FOLDERS[folder] + "/")).read_text()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tritonq"):
                    assert node.module in modules, f"{name} imports {node.module}, which the wheel lacks"


def test_the_sdist_holds_every_file_once(built, tracked):
    with tarfile.open(built[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in tracked if not (ROOT / name).is_symlink()} - names == set()
    assert not [name for name in names if name.startswith(("src/", "tritonq/kernels/", "tritonq/perf/"))]


def test_the_metadata(built):
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == tritonq.__version__
    classifiers = metadata.get_all("Classifier")
    minors = [int(found[1]) for found in (re.search(r":: 3\.(\d+)$", text) for text in classifiers) if found]
    assert metadata["Requires-Python"] == f">=3.{min(minors)}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == f"3.{min(minors)}"
    assert tools["ruff"]["target-version"] == f"py3{min(minors)}"
    assert f"\nversion: {tritonq.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The interpreter of an environment with the wheel, and by a .pth file what is installed here.

    A .pth file inside a folder that a .pth file names has no effect, so an editable install of this project does not
    reach the new environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(packages)
    installed = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(installed) + "\n")
    return python


SCRIPT = """
import torch

import tritonq

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
images = torch.randn(4, 3, 8, 8)
qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=images)
qat.train()
qat(images).sum().backward()
qat.eval()
int8 = tritonq.convert(qat)
tritonq.save_converted(int8, "model.int8.pt")
print(tritonq.verify(qat, int8, images))
"""


def test_the_wheel_trains_and_deploys_in_an_empty_environment(environment, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    where = run([environment, "-c", "import tritonq; print(tritonq.__file__)"], cwd=tmp_path, env=clean)
    assert Path(where.strip()).is_relative_to(environment.parent.parent)
    (tmp_path / "script.py").write_text(SCRIPT)
    assert "no code differs" in run([environment, "script.py"], cwd=tmp_path, env=clean)
    doctor = run([environment, "-m", "tritonq", "doctor"], cwd=tmp_path, env=clean)
    assert re.search(rf"tritonq +{re.escape(tritonq.__version__)}\n", doctor)
    assert "--case" in run([environment, "-m", "tritonq", "bench", "--help"], cwd=tmp_path, env=clean)


def test_an_editable_install_is_a_path_that_type_checkers_can_follow(tracked, tmp_path):
    """One folder with nothing but the package in it, and every module under its own name."""
    copy_project(tracked, tmp_path)
    run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('dist')"], cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path_file,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        folder = Path(archive.read(path_file).decode().strip())
    assert [entry.name for entry in folder.iterdir()] == ["tritonq"]
    for name in ("__init__.py", "py.typed", "kernels/__init__.py", "perf/cases/__init__.py"):
        assert (folder / "tritonq" / name).exists()
