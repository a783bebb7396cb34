"""The interface of a method: roles, and turns that each train one of them.

A method is given tensors and networks as TrigFlow's F(x_t, t, labels[, second time]), and returns losses. It knows no
optimizer, device, file or process: `training` cycles through the turns and freezes every role but the turn's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, overload

import msgspec
from msgspec import Meta
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.pieces import Pieces
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.heads import HeadKind
from edmdistill.networks.surgery.last_layer import LastLayer

ConfigT = TypeVar("ConfigT")
SecondGain = Annotated[
    float,
    Meta(ge=0, le=10, description="weight of the second time in the network at first; 0 keeps the teacher's function"),
]


class FlowFunction(Protocol):
    """A network as a method calls it; FlowNetwork documents all forms.

    Args:
        conditions: labels [B,label_dim] or None; then the second time [B], for a role of two times.
        w: weights of guidance, for a guided role.  [B]
    """

    @overload
    def __call__(self, x_t: Tensor, t: Tensor, /, *conditions: Tensor | None, w: Tensor | None = None) -> Tensor:
        """Returns F.  x_t, F [B,C,H,W]; t [B]"""

    @overload
    def __call__(
        self, x_t: Tensor, t: Tensor, /, *conditions: Tensor | None, u_at: tuple[Tensor, ...], w: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Returns F and, for each of n times [B], the log variance u [B] at that time; the role needs n logvars."""

    @overload
    def __call__(
        self, x_t: Tensor, t: Tensor, /, *conditions: Tensor | None, logits: Literal["also"]
    ) -> tuple[Tensor, Tensor]:
        """Returns F and the logits of the role's head.  [B,n]"""

    @overload
    def __call__(self, x_t: Tensor, t: Tensor, /, *conditions: Tensor | None, logits: Literal["alone"]) -> Tensor:
        """Returns the logits.  [B,n]"""

    @overload
    def __call__(
        self, x_t: Tensor, t: Tensor, /, *conditions: Tensor | None, features: Literal[True]
    ) -> tuple[Tensor, ...]:
        """Returns the encoder's features, of each level, the bottleneck last.  [B,C,h,w] each"""

    @overload
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        /,
        *conditions: Tensor | None,
        along: tuple[Tensor, ...],
        u_at: tuple[Tensor, ...] = (),
        w: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns F; its derivative along (dx, dt), or (dx, dt, dsecond), without gradient; and the log variances."""


def with_inputs(network: FlowFunction, **inputs: Tensor | None) -> FlowFunction:
    """Returns the network with inputs filled in, for callers that do not know of them.

    Args:
        inputs: w, a guidance weight; second, a time; or augment_labels; None: left open.
    """
    fixed: dict[str, Any] = {name: value for name, value in inputs.items() if value is not None}
    return partial(network, **fixed) if fixed else network  # type: ignore[return-value]


class WatchedFunction(FlowFunction, Protocol):
    """A network whose last layer can be observed."""

    def watch(self) -> AbstractContextManager[LastLayer]:
        """Records the last layer's calls while the context is open; see LastLayer."""


class Batch(NamedTuple):
    """Training data.

    Attributes:
        x0: images or latents as the teacher takes them, float32.  [B,C,H,W]
        labels: float32, or None.  [B,label_dim]
        images: images seen before this batch's round.
        augment_labels: of x0, see `augment_pipe`; None: it is not augmented.  [B,k]
    """

    x0: Tensor
    labels: Tensor | None
    images: int = 0
    augment_labels: Tensor | None = None

    def conditioned(self, network: FlowFunction) -> FlowFunction:
        """Returns the network, conditioned on the augmentation labels."""
        return with_inputs(network, augment_labels=self.augment_labels)


class NoiseRange(NamedTuple):
    """The teacher's noise levels: standard deviation of its data, smallest and largest sigma it was trained for."""

    sigma_data: float
    sigma_min: float
    sigma_max: float

    @classmethod
    def of(cls, flow: FlowNetwork) -> NoiseRange:
        """Returns the noise levels of a network."""
        return cls(flow.sigma_data, flow.sigma_min, flow.sigma_max)


class EmaOf(NamedTuple):
    """The role that another is the moving average of: each step sets its weights to decay old + (1 - decay) new."""

    role: str
    decay: float


class Role(NamedTuple):
    """A network's part in a method.

    Attributes:
        trained: has turns.
        two_time: takes a second time.
        second_gain: gain of the second time at first; 0 keeps the function of the source.
        logvars: number of log-variance heads u(t).
        guided: takes the guidance weight.
        source: the network it is initialized from: the teacher, or the guide, another network of the same data.
        ema_of: the role it is the moving average of, or None.
        head: kind of the discriminator of its features, a key of networks.heads.HEADS; None: it has none.
        make: (teacher, seed) -> a network of another kind; None: a copy of the source.
        sigma_min: the lowest noise level that it is for; None: the source's.
        augment_dim: number of augmentation labels that it is conditioned on.
    """

    trained: bool
    two_time: bool = False
    second_gain: float = 0.0
    logvars: int = 0
    guided: bool = False
    source: Literal["teacher", "guide"] = "teacher"
    ema_of: EmaOf | None = None
    head: HeadKind | None = None
    make: Callable[[FlowNetwork, int], nn.Module] | None = None
    sigma_min: float | None = None
    augment_dim: int = 0

    @property
    def frozen(self) -> bool:
        """Returns whether it remains a copy of the teacher or the guide throughout."""
        return not self.trained and self.ema_of is None and self.make is None


class Loss(NamedTuple):
    """A turn's loss, and what the monitors read.

    Attributes:
        value: loss of each sample.  [B]
        t: time of each sample.  [B]
        signals: means over the samples, 0-dim and detached.
        generated: images that the generator produced in this turn, detached unless an adversary may judge them.
            [B,C,H,W]
    """

    value: Tensor
    t: Tensor
    signals: dict[str, Tensor] = {}
    generated: Tensor | None = None

    def plus(self, other: Loss, weight: float) -> Loss:
        """Returns this loss plus `weight` times another one of the same samples, with the signals of both."""
        return self._replace(value=self.value + weight * other.value, signals=self.signals | other.signals)


class Preview(NamedTuple):
    """Statistics of a micro-batch, computed for the whole batch before the first loss.

    Attributes:
        means: means over the micro-batch; the loss is given those over the whole batch.
        cached: results that the loss of the same micro-batch reuses.
    """

    means: dict[str, Tensor]
    cached: Any = None


class Turn(NamedTuple):
    """One optimizer step of one role.

    Attributes:
        loss: (batch, draws) -> Loss; with a preview, (batch, draws, preview).
        preview: (batch, draws) -> Preview, called for every micro-batch before the first loss.
        begins: images seen before the first of these turns.
    """

    role: str
    loss: Callable[..., Loss]
    preview: Callable[[Batch, Draws], Preview] | None = None
    begins: int = 0

    def whole(self, batch: Batch, draws: Draws) -> Loss:
        """Returns the loss of a batch that is not split into micro-batches."""
        return self.loss(batch, draws) if self.preview is None else self.loss(batch, draws, self.preview(batch, draws))


class Sampling(NamedTuple):
    """How the product is to be sampled, by default.

    Attributes:
        steps: their number, where it is trained for these alone; None: any.
        gamma: share of fresh noise between two of them.
    """

    steps: int | None = None
    gamma: float = 1.0


class Method(ABC, Generic[ConfigT]):
    """A distillation algorithm.

    Class attributes:
        Config: a frozen msgspec.Struct; its fields are the [method] table of a recipe.
        roles: the networks of the default options, by name; `roles_for` gives those of others.
        product: the role whose average is the run's result.
        noise_levels: the options that are noise levels of the teacher's range; one that is 0 stands for none.
        first_stages: methods whose generators are its teachers, and "diffusion" where a diffusion model is one, too;
            none: a teacher is a diffusion model.
        stages_have_steps: whether a first stage may be trained for certain steps alone, as in progressive distillation;
            else it has to jump from every noise level to data.
        splits_loss: whether the generator's loss goes through `pieces`.
        pieces: how it is computed.
    """

    Config: ClassVar[type[msgspec.Struct]]
    roles: ClassVar[dict[str, Role]]
    product: ClassVar[str] = "generator"
    noise_levels: ClassVar[tuple[str, ...]] = ()
    first_stages: ClassVar[tuple[str, ...]] = ()
    stages_have_steps: ClassVar[bool] = False
    splits_loss: ClassVar[bool] = False
    pieces: Pieces = Pieces()

    def __init__(self, config: ConfigT, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        """networks: of every role, a FlowFunction or what its `make` returns."""
        self.config, self.networks, self.noise = config, networks, noise

    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """Returns one round: the turns in order."""

    @classmethod
    def roles_for(cls, config: ConfigT) -> dict[str, Role]:
        """Returns the roles under these options."""
        return cls.roles

    @classmethod
    def group_size(cls, config: ConfigT) -> int:
        """Returns how many images, next to one another in the batch, have losses that depend on one another.

        The batch is a multiple of it, and is split between groups alone.
        """
        return 1

    @classmethod
    def check_teacher(
        cls, config: ConfigT, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        """Returns why a teacher is unsuitable, as a sentence with the fix, or None.

        Args:
            positional_time: its input is t, through a positional embedding.
            label_dim: number of its classes.
            label_dropout: share of its training without labels, in [0, 1]; None: unknown.
        """
        return None

    @classmethod
    def check_stage(cls, config: ConfigT, steps: int) -> str | None:
        """Returns why a first stage of so many steps is unsuitable, as a sentence with the fix, or None.

        It is asked where `stages_have_steps`.
        """
        return None

    @classmethod
    def guidance(cls, config: ConfigT) -> tuple[float, float]:
        """Returns the range of guidance weights that the product takes; (1, 1): none."""
        return 1.0, 1.0

    @classmethod
    def sampling(cls, config: ConfigT) -> Sampling:
        """Returns how the product is to be sampled."""
        return Sampling()

    @classmethod
    def schedule(cls, config: ConfigT, noise: NoiseRange) -> tuple[float, ...]:
        """Returns the falling noise levels of the steps that it is trained for; () where these are any."""
        return ()

    def monitor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Returns signals that need passes of their own, without gradients; a run asks for them in some log lines."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """Returns sentences to print before a run: consequences of the options, known risks."""
        return ()
