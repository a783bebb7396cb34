"""The names that stay."""

import importlib
import subprocess
import sys

import pytest

import edmdistill

CLASSES = "Denoiser", "EdmDistillError", "Generator", "SamplerSpec"
FUNCTIONS = "convert", "evaluate", "load_denoiser", "load_features", "load_generator", "sample"
NAMES = sorted([*CLASSES, *FUNCTIONS, "__version__"])


def test_the_public_names_are_these():
    assert sorted(edmdistill.__all__) == NAMES
    assert dir(edmdistill) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str):
    value = getattr(edmdistill, name)
    assert value is getattr(importlib.import_module("edmdistill"), name)
    assert isinstance(value, str) or value.__doc__
    assert isinstance(value, type) == (name in CLASSES)
    assert callable(value) == (name != "__version__")


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        edmdistill.distill  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, edmdistill; dir(edmdistill); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
