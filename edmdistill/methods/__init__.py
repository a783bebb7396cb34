"""The table of methods: all that the rest of the package has to know of one before it runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from edmdistill.methods.base import Method


class MethodEntry(NamedTuple):
    """A line of METHODS.

    Attributes:
        path: `module:Class`; the module is imported on first use, for it imports torch.
        summary: one sentence, for `--help`, reports and cards.
        citations: keys in assets/citations.bib, beside that of the network.
    """

    path: str
    summary: str
    citations: tuple[str, ...] = ()

    def load(self) -> type[Method[Any]]:
        """Returns the class."""
        module, _, name = self.path.partition(":")
        method: type[Method[Any]] = getattr(import_module(module), name)
        return method


METHODS: dict[str, MethodEntry] = {
    "diffusion": MethodEntry(
        "edmdistill.methods.diffusion:Diffusion",
        "Diffusion training in TrigFlow: how a teacher is made.",
    ),
    "cosim": MethodEntry(
        "edmdistill.methods.cosim:CoSIM",
        "CoSIM: continuous semi-implicit models, a generator of any number of steps.",
        ("yu2025cosim",),
    ),
    "sid": MethodEntry(
        "edmdistill.methods.sid:SiD",
        "SiD: score identity distillation, a generator of one step, from the teacher alone.",
        ("zhou2024sid",),
    ),
    "scd": MethodEntry(
        "edmdistill.methods.scd:SCD",
        "sCD: continuous-time consistency models, distilled from a teacher.",
        ("lu2025scm",),
    ),
    "sct": MethodEntry(
        "edmdistill.methods.sct:SCT",
        "sCT: continuous-time consistency models, trained on data alone.",
        ("lu2025scm",),
    ),
    "dscd": MethodEntry(
        "edmdistill.methods.dscd:DSCD",
        "dsCD: discrete-time consistency distillation with sCM's objective, over N intervals of EDM's noise levels.",
        ("lu2025scm",),
    ),
    "vsd": MethodEntry(
        "edmdistill.methods.vsd:VSD",
        "aVSD: adaptive variational score distillation, a generator of one step, from the teacher alone.",
        ("wang2023vsd", "lu2025scm"),
    ),
    "ctm": MethodEntry(
        "edmdistill.methods.ctm:CTM",
        "CTM: consistency trajectory models, a generator that jumps from any time to any earlier one.",
        ("kim2024ctm",),
    ),
}
"""By the names that the command line and recipes use."""
