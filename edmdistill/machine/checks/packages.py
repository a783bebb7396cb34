"""Checks of Python and of the installed packages.

Packages that could crash this process, or change it, are imported in another process.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import edmdistill
from edmdistill.machine.checks.finding import Finding


def check_python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("edmdistill", "ok", f"{edmdistill.__version__} in {Path(edmdistill.__file__).parent}")


def check_requirements() -> Iterator[Finding]:
    """Compares the installed versions with those that this package requires."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("edmdistill") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "requirements", "fail", "edmdistill itself is not installed", "run pip install -e . in its folder"
        )
        return
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, str(requirement.specifier)
        fix = f"pip install '{name}{bounds}'"
        version = _version(name)
        if version is None:
            yield Finding(name, "fail", "not installed", fix)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "fail", f"{version}, but {bounds} is needed", fix)
        else:
            yield Finding(name, "ok", version + (f" ({bounds})" if bounds else ""))


def check_torch() -> Iterator[Finding]:
    if _version("torch") is None:
        return  # check_requirements reports it
    error = _import_error("torch")
    if error is not None:
        fix = "reinstall it with the command that pytorch.org gives for this system and driver"
        yield Finding("torch", "fail", f"cannot be imported: {error}", fix)
        return
    import torch

    cuda = torch.version.cuda
    yield Finding("torch build", "ok", f"for CUDA {cuda}" if cuda else "CPU only")


def check_namesakes() -> Iterator[Finding]:
    """Finds PyPI packages with the names of NVIDIA's modules, which official code would import in their place."""
    installed = [name for name in ("dnnlib", "torch_utils") if _version(name) is not None]
    if installed:
        detail = f"{' and '.join(installed)} from PyPI, unrelated to NVIDIA's modules of that name"
        fix = f"pip uninstall {' '.join(installed)}; edmdistill reads official pickles without them"
        yield Finding("namesakes", "warn", detail, fix)
    else:
        yield Finding("namesakes", "ok", "no dnnlib or torch_utils from PyPI")


def check_image_packages() -> Iterator[Finding]:
    """Checks torchvision and timm: no command needs them, but broken ones break diffusers and transformers."""
    for name in ("torchvision", "timm"):
        version = _version(name)
        if version is None:
            yield Finding(name, "ok", "not installed (not needed)")
            continue
        error = _import_error(name)
        if error is None:
            yield Finding(name, "ok", version)
        else:
            yield Finding(
                name,
                "fail",
                f"{version} does not match torch {_version('torch')}, which breaks diffusers and transformers: {error}",
                f"pip uninstall {name}, or install the {name} version for this torch from the same index",
            )


def _version(name: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Returns the error of importing a module in another process; None: it imports."""
    command = [sys.executable, "-P", "-c", f"import {module}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    if done.returncode > 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None
