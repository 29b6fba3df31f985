"""Find the packages in the three folders that make one distribution. All else stands in pyproject.toml.

setuptools can't find packages in a folder whose package has another name: `kernels/` at the top is installed as
`tritonq.kernels`, `perf/` as `tritonq.perf`.

A checkout has three links: `tritonq/kernels`, `tritonq/perf`, and `src/tritonq` with nothing beside it. An editable
install puts `src` on the path. Type checkers and editors can follow that; they can't follow the import hook that
setuptools would install for three folders. (The top folder on the path would offer `kernels` and `tests` as packages to
every program.)
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Package: folder.
FOLDERS = {"tritonq": "tritonq", "tritonq.kernels": "kernels", "tritonq.perf": "perf"}
# Modules and packages of perf that are run from the repository by who develops tritonq; the wheel goes without them.
DEVELOPER_MODULES = ("codegen*", "disassembly", "goals", "plot", "predict")


# Links in the folder of tritonq.
LINKS = ("kernels", "kernels.*", "perf", "perf.*")


def packages() -> list[str]:
    """Return every package in the three folders."""
    return [
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder, exclude=(*LINKS, "codegen*"))))
    ]


def package_folders() -> dict[str, str]:
    """Return the folder of each package; one folder for all of them in an editable install of a checkout."""
    return {"": "src"} if "editable_wheel" in sys.argv and Path("src", "tritonq").is_symlink() else FOLDERS


class BuildForUsers(build_py):
    """Leave out what only developers need."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of each module that belongs into the wheel."""
        found = super().find_package_modules(package, package_dir)
        if package != "tritonq.perf":
            return found
        return [entry for entry in found if not any(fnmatch(entry[1], pattern) for pattern in DEVELOPER_MODULES)]


setup(packages=packages(), package_dir=package_folders(), cmdclass={"build_py": BuildForUsers})
