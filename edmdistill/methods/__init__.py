"""The table of methods: everything the package knows about a method without importing it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from edmdistill.errors import EdmDistillError

if TYPE_CHECKING:
    from edmdistill.methods.base import Method

GROUP = "edmdistill.methods"
"""The group of entry points by which another installed package adds methods, NAME = "module:Class"."""


class MethodEntry(NamedTuple):
    """An entry of METHODS.

    Attributes:
        path: `module:Class`; the module is imported on first use, because it imports torch.
        summary: one sentence, for `--help`, reports and cards.
        citations: keys in assets/citations.bib, in addition to the network's.
        rival: another package that has a method of the same name.
    """

    path: str
    summary: str
    citations: tuple[str, ...] = ()
    rival: str | None = None

    def load(self) -> type[Method[Any]]:
        """Returns the method's class.  Raises: EdmDistillError: the name could also mean another's."""
        if self.rival is not None:
            raise EdmDistillError(
                f"two methods have the same name, {self.path} and one of the package {self.rival}: rename that "
                f"package's entry point, or uninstall it (pip uninstall {self.rival})"
            )
        module, _, name = self.path.partition(":")
        method: type[Method[Any]] = getattr(import_module(module), name)
        return method


METHODS: dict[str, MethodEntry] = {
    "diffusion": MethodEntry(
        "edmdistill.methods.diffusion:Diffusion",
        "Diffusion training in TrigFlow: how a teacher is trained.",
    ),
    "cosim": MethodEntry(
        "edmdistill.methods.cosim:CoSIM",
        "CoSIM: continuous semi-implicit models, a generator for any number of steps.",
        ("yu2025cosim",),
    ),
    "sid": MethodEntry(
        "edmdistill.methods.sid:SiD",
        "SiD: score identity distillation, a one-step generator trained from the teacher alone.",
        ("zhou2024sid",),
    ),
    "sida": MethodEntry(
        "edmdistill.methods.sida:SiDA",
        "SiDA: SiD with an adversary in the encoder of the auxiliary score.",
        ("zhou2025sida",),
    ),
    "dmd2": MethodEntry(
        "edmdistill.methods.dmd2:DMD2",
        "DMD2: distribution matching with an adversary, in one step or several; with f_divergence, f-distill.",
        ("yin2024dmd2", "xu2025fdistill"),
    ),
    "ladd": MethodEntry(
        "edmdistill.methods.ladd:LADD",
        "LADD: a generator, of one step or several, that learns from a discriminator of the teacher's features alone.",
        ("sauer2024ladd",),
    ),
    "kd": MethodEntry(
        "edmdistill.methods.kd:KD",
        "KD: knowledge distillation, regression on the ends of the teacher's trajectories, in one step or several.",
        ("luhman2021kd",),
    ),
    "pd": MethodEntry(
        "edmdistill.methods.pd:PD",
        "PD: progressive distillation, by stages in which each step learns to do two of the teacher's.",
        ("salimans2022pd",),
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
        "aVSD: adaptive variational score distillation, a one-step generator trained from the teacher alone.",
        ("wang2023vsd", "lu2025scm"),
    ),
    "ctm": MethodEntry(
        "edmdistill.methods.ctm:CTM",
        "CTM: consistency trajectory models, a generator that jumps from any time to any earlier one.",
        ("kim2024ctm",),
    ),
    "fmd": MethodEntry(
        "edmdistill.methods.fmd:FMD",
        "FMD: flow-map distillation (Align Your Flow), a generator that jumps from any time to any earlier one.",
        ("sabour2025ayf",),
    ),
    "mean-flow": MethodEntry(
        "edmdistill.methods.mean_flow:MeanFlow",
        "MeanFlow: flow maps, trained on data alone.",
        ("geng2025meanflow",),
    ),
    "ect": MethodEntry(
        "edmdistill.methods.ect:ECT",
        "ECT: easy consistency tuning, discrete pairs of noise levels that close in, trained on data alone.",
        ("geng2024ect",),
    ),
    "cd": MethodEntry(
        "edmdistill.methods.cd:CD",
        "CD: consistency distillation, a generator that agrees with itself at both ends of a step of the teacher.",
        ("song2023cm",),
    ),
    "tcm": MethodEntry(
        "edmdistill.methods.tcm:TCM",
        "TCM: truncated consistency models, a second stage that trains a consistency model at high noise alone.",
        ("lee2025tcm",),
    ),
    "imm": MethodEntry(
        "edmdistill.methods.imm:IMM",
        "IMM: inductive moment matching, a generator that jumps from any time to any earlier one, from data alone.",
        ("zhou2025imm",),
    ),
}
"""By the name used on the command line and in recipes."""


def _add_installed() -> None:
    """Adds the methods of other installed packages to METHODS. Nothing of theirs is imported before it is used."""
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.module
        if point.name in METHODS:
            METHODS[point.name] = METHODS[point.name]._replace(rival=package)
        else:
            METHODS[point.name] = MethodEntry(point.value, f"{point.name}: a method of the package {package}.")


_add_installed()
