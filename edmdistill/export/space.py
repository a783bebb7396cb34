"""Exports to a Space of the Hugging Face Hub: a web page, by gradio, that draws images on request.

gradio is no dependency of this package, not even an optional one, because it keeps pillow below 13: the exported folder
lists what it needs.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from edmdistill import __version__
from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.store import save_checkpoint
from edmdistill.errors import EdmDistillError
from edmdistill.export.parity import SEEDS, Parity, compare
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.generate import sample

GRADIO = "6.31.0"
"""The version that the page was tested with."""
HEADER = {"sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py", "title": "A few-step generator"}
APP = Path(__file__).parent / "remote" / "app.py"
REQUIREMENTS = f"""\
--extra-index-url https://download.pytorch.org/whl/cpu
edmdistill{{extra}}=={__version__}
gradio=={GRADIO}
"""


def readme(flow: FlowNetwork, config: CheckpointConfig) -> str:
    """Raises: EdmDistillError: it is a teacher, which needs many steps."""
    if config.stage != "generator":
        raise EdmDistillError("a Space shows a generator, but this is a teacher: choose another --to")
    return """\
    pip install -r requirements.txt
    python app.py

shows it on this machine. On the Hub it is a Space:

    hf repos create OWNER/NAME --repo-type space --space-sdk gradio
    hf upload OWNER/NAME . . --repo-type space

The generator is in the folder `generator`. The variable GENERATOR names another in its place, as OWNER/NAME on the Hub.
Where pip finds no edmdistill of this version, put its wheel (`pip wheel --no-deps` in its sources) beside app.py, and
the wheel's file name in its place in requirements.txt.
"""


def without_vae(config: CheckpointConfig) -> str:
    """Raises: EdmDistillError: always, because a Space shows pictures."""
    name = config.encoder.get("vae_name", "that its latents were encoded by")
    raise EdmDistillError(
        f"a Space shows pictures, and the VAE {name} of this generator is not in the Hub's cache: name its folder or "
        "its Hub id with --vae"
    )


def write(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> tuple[Parity, ...]:
    """Writes generator/, app.py and requirements.txt, and loads the generator as the app does."""
    save_checkpoint(folder / "generator", flow, config)
    (folder / "app.py").write_text(APP.read_text(encoding="utf-8"), encoding="utf-8")
    extra = "[latent]" if config.latent else ""
    (folder / "requirements.txt").write_text(REQUIREMENTS.format(extra=extra), encoding="utf-8")
    reloaded: Generator = load_generator(folder / "generator")

    def images(nfe: int) -> Tensor:
        return sample(reloaded, nfe, seeds=SEEDS)

    return compare(flow, config, images)
