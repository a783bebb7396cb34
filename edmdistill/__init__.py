"""edmdistill turns pretrained EDM and EDM2 diffusion checkpoints into few-step generators.

The public names below are imported on first use, so that `import edmdistill` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edmdistill.checkpoints.convert import convert
    from edmdistill.checkpoints.generator import Generator
    from edmdistill.checkpoints.load import load_denoiser, load_generator
    from edmdistill.errors import EdmDistillError
    from edmdistill.evaluation.evaluate import evaluate
    from edmdistill.features.spaces import load_features
    from edmdistill.networks.flow import Denoiser
    from edmdistill.sampling.generate import sample
    from edmdistill.sampling.spec import SamplerSpec

__version__ = "0.1.0.dev0"

_HOMES = {
    "Denoiser": "edmdistill.networks.flow",
    "EdmDistillError": "edmdistill.errors",
    "Generator": "edmdistill.checkpoints.generator",
    "SamplerSpec": "edmdistill.sampling.spec",
    "convert": "edmdistill.checkpoints.convert",
    "evaluate": "edmdistill.evaluation.evaluate",
    "load_denoiser": "edmdistill.checkpoints.load",
    "load_features": "edmdistill.features.spaces",
    "load_generator": "edmdistill.checkpoints.load",
    "sample": "edmdistill.sampling.generate",
}

__all__ = [
    "Denoiser",
    "EdmDistillError",
    "Generator",
    "SamplerSpec",
    "__version__",
    "convert",
    "evaluate",
    "load_denoiser",
    "load_features",
    "load_generator",
    "sample",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edmdistill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
