"""Packaging: `kernels/` and `schedules/` ship as `rlhfuse.kernels` and `rlhfuse.schedules`.

The mapping is the two links inside `rlhfuse/`; setuptools, mypy and pyright all follow them.
Neither folder has an `__init__.py`, so a checkout on `sys.path` never hides the PyPI packages
of the same names (Ray puts the driver's working directory first on every worker's path).
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(include=["rlhfuse", "rlhfuse.*"]),
    package_data={"rlhfuse": ["py.typed", "*.html", "**/*.html", "**/*.js", "**/*.css"]},
)
