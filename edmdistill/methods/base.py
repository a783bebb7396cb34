"""What a method is: roles, and turns that each train one of them.

A method gets tensors and networks in their TrigFlow reading, F(x_t, t, labels[, second time]), and gives back losses.
It knows no optimiser, device, file or process: `training` runs the turns, in order, for ever, and freezes every role
but the turn's own while it does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, overload

import msgspec
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.last_layer import LastLayer


class FlowFunction(Protocol):
    """A network as a method knows it; FlowNetwork describes both calls."""

    @overload
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        second: Tensor | None = None,
        /,
        *,
        w: Tensor | None = None,
    ) -> Tensor:
        """F.  x_t, F [B,C,H,W]; t, second [B]; labels [B,label_dim]; w [B], for a role that is guided"""

    @overload
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        second: Tensor | None = None,
        /,
        *,
        u_at: tuple[Tensor, ...],
        w: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """F, and for each of n times [B] the log variance u [B] of a loss then, for a role with n logvars or more."""

    def tangent(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor, /, *, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """F and its derivative along (dx, dt), without gradient and with the dropout of the next call."""


class WatchedFunction(FlowFunction, Protocol):
    """A network whose last layer a method looks at."""

    def watch(self) -> AbstractContextManager[LastLayer]:
        """Within it, the last layer remembers its calls; see LastLayer."""


class Batch(NamedTuple):
    """Training data.

    Attributes:
        x0: float32 in the teacher's space.  [B,C,H,W]
        labels: float32, or None.  [B,label_dim]
        images: seen before this batch's round.
    """

    x0: Tensor
    labels: Tensor | None
    images: int = 0


class NoiseRange(NamedTuple):
    """The noise levels that the teacher knows: standard deviation of its data, smallest and largest sigma."""

    sigma_data: float
    sigma_min: float
    sigma_max: float


class EmaOf(NamedTuple):
    """Whose moving average a role is: after each of its steps the weights become decay old + (1 - decay) new."""

    role: str
    decay: float


class Role(NamedTuple):
    """A network's part in a method.

    Attributes:
        trained: it has turns.
        two_time: it reads a second time.
        logvars: how many heads for u(t) it has.
        guided: it reads the weight of guidance.
        source: whose network it starts as: the teacher's, or that of the guide, another network of the same data.
        ema_of: the role whose moving average it is; None: its weights are its own.
        make: makes a network of another kind, from the teacher and a seed; None: the network is the source's copy.
    """

    trained: bool
    two_time: bool = False
    logvars: int = 0
    guided: bool = False
    source: Literal["teacher", "guide"] = "teacher"
    ema_of: EmaOf | None = None
    make: Callable[[FlowNetwork, int], nn.Module] | None = None

    @property
    def frozen(self) -> bool:
        """Whether it stays the teacher, or the guide, for good."""
        return not self.trained and self.ema_of is None and self.make is None


class Loss(NamedTuple):
    """What a turn's network is to lower, and what monitors look at.

    Attributes:
        value: each sample's loss, summed over pixels.  [B]
        t: the time at which each sample was taken.  [B]
        signals: means over the samples, 0-dim and detached.
        generated: the images that the generator made in this turn, detached.  [B,C,H,W]
    """

    value: Tensor
    t: Tensor
    signals: dict[str, Tensor] = {}
    generated: Tensor | None = None


class Preview(NamedTuple):
    """What a turn sees of a micro-batch before any of it is learnt from.

    Attributes:
        means: over the micro-batch's rows; when the loss gets them, over those of the whole batch.
        kept: what the loss of the same rows goes on with.
    """

    means: dict[str, Tensor]
    kept: Any = None


class Turn(NamedTuple):
    """One optimiser step of one role.

    Attributes:
        loss: (batch, draws) -> Loss; with a preview, (batch, draws, preview).
        preview: (batch, draws) -> Preview, of every micro-batch before the first loss.
        begins: the images that have been seen before the first of these turns is taken.
    """

    role: str
    loss: Callable[..., Loss]
    preview: Callable[[Batch, Draws], Preview] | None = None
    begins: int = 0

    def whole(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of a batch that is not cut."""
        return self.loss(batch, draws) if self.preview is None else self.loss(batch, draws, self.preview(batch, draws))


class Method(ABC):
    """A distillation algorithm.

    Class attributes:
        Config: a frozen msgspec.Struct; its fields are the [method] table of a recipe.
        roles: the networks it plays with by default, by name; `roles_for` says which under other options.
        product: the role whose average is what a run is for.
    """

    Config: ClassVar[type[msgspec.Struct]]
    roles: ClassVar[dict[str, Role]]
    product: ClassVar[str] = "generator"

    @abstractmethod
    def __init__(self, config: msgspec.Struct, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        """networks: of every role, a FlowFunction, or what its `make` makes."""

    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """One round: the turns in the order in which they are taken."""

    @classmethod
    def roles_for(cls, config: msgspec.Struct) -> dict[str, Role]:
        """The roles that play under these options; those of the default ones, unless a method says otherwise."""
        return cls.roles

    @classmethod
    def check_teacher(
        cls, config: msgspec.Struct, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        """Why a teacher will not do, in a sentence with the fix; None: it will.

        Args:
            positional_time: whether it reads t itself, by a positional embedding.
            label_dim: the number of its classes.
            label_dropout: the share of its training in which it was given none, in [0, 1]; None: whatever it was.
        """
        return None

    @classmethod
    def guidance(cls, config: msgspec.Struct) -> tuple[float, float]:
        """The least and the greatest weight of guidance that the product knows; (1, 1): none."""
        return 1.0, 1.0

    def notes(self) -> tuple[str, ...]:
        """Sentences worth reading before a run: what follows from the options, what is known to be risky."""
        return ()
