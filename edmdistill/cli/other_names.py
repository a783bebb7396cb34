"""What options of EDM's and EDM2's scripts, diffusers and Accelerate are called here."""

from __future__ import annotations

from collections.abc import Mapping

import click

_OUT = ("--out", "--run-dir", "OUT", "OUT.zip", "OUT.npz")
_SOURCE = ("SOURCE", "TEACHER", "GENERATOR")
_STEPS = ("--nfe N, in network evaluations: Heun's method takes 2 N - 1 for N steps",)
_IMAGES = ("--set training.images=N, in images",)
_PRECISION = ("--set training.precision=bf16", "--dtype")
_SHARES = ("--seeds LIST, a part of them in a command for each GPU, with an --out of its own",)
_STATES = ("--set training.snapshot_every=N, in images",)
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("outdir", "out-dir", "output-dir", "output", "dest"), _OUT),
    **dict.fromkeys(("network", "net", "model", "ckpt", "checkpoint", "source"), _SOURCE),
    **dict.fromkeys(("pretrained-model-name-or-path", "pretrained-teacher-model"), _SOURCE),
    **dict.fromkeys(("steps", "num-steps", "num-inference-steps"), _STEPS),
    **dict.fromkeys(("duration", "max-train-steps", "num-train-epochs"), _IMAGES),
    **dict.fromkeys(("fp16", "bf16", "precision", "mixed-precision", "torch-dtype"), _PRECISION),
    **dict.fromkeys(("gpus", "num-gpus", "num-processes", "nproc-per-node"), ("--processes", *_SHARES)),
    "processes": _SHARES,
    **dict.fromkeys(("resume", "resume-from-checkpoint"), ("--run-dir of the run: the same command resumes it",)),
    **dict.fromkeys(("batch", "train-batch-size"), ("--set training.batch=N",)),
    **dict.fromkeys(("batch-size", "eval-batch-size"), ("--set training.batch=N", "--batch")),
    **dict.fromkeys(("batch-gpu", "gradient-accumulation-steps"), ("--micro-batch N, the images of one pass",)),
    **dict.fromkeys(("lr", "learning-rate"), ("--set training.lr=X",)),
    **dict.fromkeys(("dataset", "dataset-name", "data-path", "train-data-dir"), ("--data",)),
    **dict.fromkeys(("num", "num-images", "num-samples"), ("--n", "--seeds 0-63")),
    **dict.fromkeys(("class-idx", "class-labels"), ("--class",)),
    **dict.fromkeys(("guidance-scale", "cfg-scale"), ("--guidance",)),
    **dict.fromkeys(("snap", "dump", "checkpointing-steps"), _STATES),
    **dict.fromkeys(("num-workers", "dataloader-num-workers"), ("--workers",)),
    "seed": ("--seeds", "--set training.seed=N"),
    "config": ("--recipe",),
    "gnet": ("--guide",),
    "transfer": ("--init",),
    "report-to": ("--log-with",),
    "use-8bit-adam": ("--set training.optimizer=adam8bit",),
    "gradient-checkpointing": ("--checkpoint-activations",),
    "S-churn": ("--churn",),
    "S-min": ("--churn-min",),
    "S-max": ("--churn-max",),
    "S-noise": ("--churn-noise",),
}
"""By their names without dashes in front, and with - for _: what to give in its place, the first that a command has."""


def name_here(option: str, command: click.Command) -> str | None:
    """Returns what a command takes in place of another program's option, as the rest of a sentence; None: unknown.

    Args:
        option: as typed.
    """
    known = {name for parameter in command.params for name in (*parameter.opts, parameter.human_readable_name)}
    for offered in OTHER_NAMES.get(option.lstrip("-").replace("_", "-"), ()):
        if offered.split()[0].rstrip(",") in known:
            return f"here it is {offered}"
    return None
