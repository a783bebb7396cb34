"""How a schedule of a generator was chosen: the measurements of `tune-schedule`, as config.json keeps them."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Annotated

from msgspec import Meta, Struct

from edmdistill.networks.preconditioning import Sigma

Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]


class Tuning(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A schedule and the one in whose place it is, measured on the same seeds; see evaluation.tune."""

    sigmas: tuple[Sigma, ...]
    """The best noise levels on the seeds of the search."""
    before: tuple[Sigma, ...]
    """The levels that the generator used until then."""
    metric: Text
    protocol: Text
    reference: Text | None
    """sha256 of the real images."""
    gamma: Number
    n: Count
    """Images of a measurement."""
    search_seeds: Text
    held_out_seeds: Text
    schedules: Count
    """Schedules that were measured in the search."""
    images: Count
    """Total number of images drawn, for search and confirmation."""
    values: tuple[Number, ...]
    before_values: tuple[Number, ...]
    """The metric of either on each set of held-out seeds; empty if nothing was better in the search."""
    gain: Number
    """By how much the mean is better on held-out seeds."""
    spread: Number
    """The larger standard deviation of the two."""
    source_sha256: Text | None
    """Digest of the weights."""
    guidance: Number = 1.0
    dtype: Text | None = None
    """Of the network's arithmetic. None here and below: not recorded, before version 1.4 of config.json."""
    weights: dict[Text, Text | None] = {}
    """The feature spaces, and the sha256 of their weights."""
    decoder: Text | None = None
    """sha256 of the VAE that decoded latents."""
    edmdistill: Text | None = None
    revision: Text | None = None
    torch: Text | None = None
    device: Text | None = None
    compiled: bool = False
    """As in the provenance of a result of `eval`."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.before_values) or len(self.values) == 1:
            raise ValueError(f"there are {len(self.values)} and {len(self.before_values)} measurements of a tuning")

    @property
    def confirmed(self) -> bool:
        """Whether the schedule is better on held-out seeds by more than the spread."""
        return self.gain > self.spread

    @property
    def words(self) -> str:
        """The measurements on held-out seeds, as in `fid@5000 3.5 ± 0.05 -> 2.81 ± 0.04 on 3 x 5,000 held-out seeds`.

        Empty if there are none.
        """
        if not self.values:
            return ""
        shown = (f"{fmean(some):.4g} ± {stdev(some):.2g}" for some in (self.before_values, self.values))
        rounded = f", in {self.dtype}" if self.dtype not in (None, "float32") else ""
        return f"{self.metric} {' -> '.join(shown)} on {len(self.values)} x {self.n:,} held-out seeds{rounded}"
