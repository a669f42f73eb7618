"""Finds the packages: ``passes/`` and ``codegen/`` stand at the top level and are installed inside ``fxopt``."""

from __future__ import annotations

from setuptools import find_packages, setup

FOLDERS = {"fxopt": "fxopt", "fxopt.passes": "passes", "fxopt.codegen": "codegen"}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
)
