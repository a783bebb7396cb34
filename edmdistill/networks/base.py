"""The interface of all networks: x and its conditioning in, raw output of unit variance out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from edmdistill.draws import uniform, words
from edmdistill.kernels.dual import value
from edmdistill.kernels.linear import lay_out_weights
from edmdistill.kernels.magnitude import normalize, normalize_weights_
from edmdistill.kernels.winograd import freeze_weights
from edmdistill.networks.arguments import check_arguments
from edmdistill.networks.embeddings import GuidanceEmbedding, SecondTime
from edmdistill.networks.levels import Layer
from edmdistill.networks.magnitude import MPConv, MPFourier, gained_layers

Judgment = Literal["none", "also", "alone"]
"""Whether a network returns the logits of its head: not at all, beside F, or without F, which spares the decoder."""


class Conditioning(NamedTuple):
    """The inputs of a network beside x.

    Attributes:
        c_noise: the scaled noise level of x, float32 or float64.  [B]
        labels: class vectors; None = all zeros = unconditional.  [B,label_dim]
        c_noise_second: the second time's noise level, for a two_time network; None = not given.  [B]
        augment_labels: EDM's augmentation vector; None = no augmentation.  [B,augment_dim]
        c_logvar: the noise levels at which the first n heads for log variances are evaluated.  n of [B]
        guidance_weight: for a guided network; None = not given.  [B] or [1]
        dropout_keys: from Draws.dropout, for training; None = no dropout.  [B] int64
        logits: whether the head's are returned.
        features: whether the encoder's features are returned, and nothing else.
    """

    c_noise: Tensor
    labels: Tensor | None = None
    c_noise_second: Tensor | None = None
    augment_labels: Tensor | None = None
    c_logvar: tuple[Tensor, ...] = ()
    guidance_weight: Tensor | None = None
    dropout_keys: Tensor | None = None
    logits: Judgment = "none"
    features: bool = False


class ResidualBlock(nn.Module):
    """A residual block of a U-Net.

    Attributes:
        layer: its number in the network, from 1; every block has its own dropout masks.
        mod_gain: rms of each modulation after normalization; None = not normalized.  [modulations]
    """

    layer: int
    mod_gain: nn.Parameter | None

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Returns scale and, if the block has one, shift of the channels.  [B,emb_channels] -> [B,C] each"""
        raise NotImplementedError(f"{type(self).__name__} is not modulated")

    def normalized_modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Returns the modulations, each at rms mod_gain at all times: y = norm(x) g0 pnorm(s) + g1 pnorm(b).

        Source: sCM, section 4.1, adaptive double normalization.  Differs: the gains are learned; the paper's are 1,
        which would change a pretrained network too much.
        """
        assert self.mod_gain is not None
        return tuple(normalize(x, 1) * gain for x, gain in zip(self.modulations(emb), self.mod_gain, strict=True))


class Network(nn.Module, ABC):
    """A denoising network without its preconditioning.

    Attributes:
        arguments: the constructor's, by name, as JSON values; type(self)(**arguments) makes the same network.
        img_resolution, img_channels: the images, [B, img_channels, img_resolution, img_resolution].
        label_dim: number of classes; 0 = unconditional.
        label_dropout: fraction of labels that training sets to zero.
        two_time: whether a second time is read.
        positional_time: whether the features of c_noise are a TimeEmbedding, for which c_noise is t.
        guided: whether a guidance weight is read.
        time_layers: names of the layers from c_noise to the last linear map of its embedding; the first makes features.
        emb_channels: channels of the embedding.
        feature_layers: the last layer of each level of the encoder, whose results are features; the bottleneck is last.
        enc, dec: the layers of encoder and decoder, by their official names.
        out_conv: the layer that returns F.
        head: the discriminator of the features, which returns logits; None: there is none. See networks.heads.
        compiled: whether the blocks run compiled; see `machine.compile`.
        rounded: whether weights are kept in half precision; see `store_convolutions`.
        execution_device: the device where it computes, if its weights wait in the host's memory; see `machine.offload`.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    label_dropout: float = 0.0
    two_time: bool
    positional_time: bool
    guided: bool
    time_layers: ClassVar[tuple[str, ...]] = ("map_noise", "map_layer0", "map_layer1")
    emb_channels: int
    feature_layers: Sequence[Layer]
    enc: nn.ModuleDict
    dec: nn.ModuleDict
    out_conv: nn.Module
    head: nn.Module | None
    compiled: bool = False
    rounded: bool = False
    execution_device: torch.device | None = None
    second_time: SecondTime | None
    map_guidance: GuidanceEmbedding | None
    logvar_fourier: MPFourier | None
    logvar_linear: nn.Module | None

    def __init__(self, arguments: dict[str, Any], img_channels: int) -> None:
        """Checks and keeps the arguments.

        Args:
            arguments: locals(), taken in the first line of the constructor.
        Raises: ValueError: see check_arguments.
        """
        super().__init__()
        self.arguments: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in arguments.items()
            if name not in ("self", "__class__")
        }
        check_arguments(type(self), self.arguments)
        self.img_resolution = arguments["img_resolution"]
        self.img_channels = img_channels
        self.label_dim = arguments["label_dim"]
        self.two_time = arguments["two_time"]
        self.positional_time = arguments["positional_time"]
        self.guided = arguments["guided"]
        self.second_time = None
        self.map_guidance = None
        self.head = None

    def blocks(self) -> list[ResidualBlock]:
        """Returns the residual blocks: the units of sharding and activation checkpointing."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def number_blocks(self) -> None:
        """Numbers the blocks; to be called at the end of the constructor."""
        for number, block in enumerate(self.blocks(), 1):
            block.layer = number

    @property
    def last_layer(self) -> nn.Module:
        """The layer that returns F."""
        return self.out_conv

    def checkpoint_blocks(self) -> None:
        """Turns on activation checkpointing: activations inside blocks are recomputed in the backward pass.

        Results, parameters and their names do not change; a backward pass costs one more forward pass, without tangents
        unless the blocks are compiled: what compiled code saves may depend on whether it computes them.
        """

        def recomputed(forward: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
            first = [args]  # with tangents, which are let go after the first run

            def run(*values: Tensor | None) -> Tensor:
                if self.compiled:
                    return forward(*first[0])
                return forward(*(first.pop() if first else values))

            # To the end of the block, where offloading and sharding release its weights.
            with set_checkpoint_early_stop(False):
                out: Tensor = checkpoint(run, *map(value, args), use_reentrant=False)
            return out

        for block in self.blocks():
            block.forward = partial(recomputed, block.forward)

    def forward(self, x: Tensor, condition: Conditioning) -> Tensor | tuple[Tensor, ...]:
        """Returns the raw output F [B,C,H,W]; the logits or the features alone; or a tuple F, logits, u_1, ..., u_n.

        The condition says which. All come from one call, so that wrappers see one forward pass.

        Args:
            x: scaled images; their dtype is the compute dtype.  [B,C,H,W]
        """
        more: list[Tensor] = []
        emb = self.embed(condition)
        skips = self.encode(x, emb, condition.dropout_keys)
        if condition.features or condition.logits != "none":
            layers = len(skips) // len(self.feature_layers)
            features = tuple(x.to(emb.dtype) for x in skips[layers - 1 :: layers])
            if condition.features:
                return features
            assert self.head is not None
            more.append(self.head(features))
            if condition.logits == "alone":
                return more[0]
        F = self.decode(skips, emb, condition.dropout_keys)
        if condition.c_logvar:
            more += self.logvars(condition.c_logvar)
        return (F, *more) if more else F

    def encode(self, x: Tensor, emb: Tensor, dropout_keys: Tensor | None) -> list[Tensor]:
        """Returns the results of the encoder's layers, the bottleneck last.

        Args:
            x: [B,C,H,W];  emb: [B or 1,emb_channels];  dropout_keys: [B]
        """
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb, dropout_keys)
            skips.append(x)
        return skips

    @abstractmethod
    def decode(self, skips: list[Tensor], emb: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """Returns F [B,C,H,W], and takes the encoder's results from the list."""

    def embed(self, condition: Conditioning) -> Tensor:
        """Returns the embedding of times, labels, augmentation and guidance weight.  -> [B or 1,emb_channels]"""
        emb = self.embed_time(self, condition.c_noise, self.early_embedding(condition))
        if self.second_time is not None and condition.c_noise_second is not None:
            emb = emb + self.second_time.gain * self.embed_time(self.second_time, condition.c_noise_second)
        if self.map_guidance is not None and condition.guidance_weight is not None:
            emb = emb + self.map_guidance(condition.guidance_weight)
        return self.finish_embedding(emb, condition)

    @abstractmethod
    def embed_time(self, layers: Any, c_noise: Tensor, early: Tensor | float = 0.0) -> Tensor:
        """Returns the embedding of a time, before the last nonlinearity.  [B] -> [B,emb_channels]

        Args:
            layers: the network itself, or its SecondTime: whose `time_layers` are used.
            early: is added to the features of c_noise.  [B or 1,features]
        """

    def early_embedding(self, condition: Conditioning) -> Tensor | float:
        """Returns what is added to the features of the first time.  -> [B or 1,features], or 0"""
        return 0.0

    @abstractmethod
    def finish_embedding(self, emb: Tensor, condition: Conditioning) -> Tensor:
        """Adds the labels, unless they are in the early embedding, and applies the last nonlinearity."""

    def drop_labels(self, condition: Conditioning, like: Tensor) -> Tensor:
        """Returns the label vectors after label dropout, in the dtype of `like`; None as zeros.  [B or 1,label_dim]"""
        labels, keys = condition.labels, condition.dropout_keys
        if labels is None:
            return like.new_zeros(1, self.label_dim)
        if keys is not None and self.label_dropout:
            labels = labels * (uniform(words(keys, 1)) >= self.label_dropout)
        return labels.to(like.dtype)

    def add_optional_layers(self) -> None:
        """Makes the layers of a second time, a guidance weight and log variances, if the arguments enable them."""
        self.second_time = SecondTime(self, *self.time_layers) if self.two_time else None
        self.map_guidance = GuidanceEmbedding(self.emb_channels) if self.guided else None
        channels, heads = self.arguments["logvar_channels"], self.arguments["logvar_heads"]
        self.logvar_fourier, self.logvar_linear = self.logvar_head(channels, heads)

    def logvar_head(self, channels: int, heads: int) -> tuple[MPFourier | None, nn.Module | None]:
        """Returns new layers for `logvars`, EDM2's logvar_fourier and logvar_linear; None each for 0 channels."""
        return (MPFourier(channels), self.logvar_linear_map(channels, heads)) if channels else (None, None)

    def logvar_linear_map(self, channels: int, heads: int) -> nn.Module:
        """Returns the map from Fourier features to u of each head, zero at first: there e^-u L + u is the loss L."""
        linear = nn.Linear(channels, heads)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def logvars(self, c: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns u of the first n heads, log variances of losses at noise levels.  n of [B] -> n of [B]

        Args:
            c: ln(sigma)/4, one tensor for each head.
        Source: EDM2, eq. 21, which has one head.
        Raises: NotImplementedError: the network has fewer heads.
        """
        if self.logvar_fourier is None or self.logvar_linear is None:
            raise NotImplementedError(f"{type(self).__name__} has no head for the log variance of the loss")
        if len(c) > self.arguments["logvar_heads"]:
            raise NotImplementedError(
                f"{type(self).__name__} has {self.arguments['logvar_heads']} heads for the log variance of the loss, "
                f"but {len(c)} were asked"
            )
        return tuple(self.logvar_linear(self.logvar_fourier(level))[:, head] for head, level in enumerate(c))

    @property
    def normalizes_weights(self) -> bool:
        """Returns whether it has EDM2's layers, and they are not folded."""
        return any(isinstance(layer, MPConv) and not layer.folded for layer in self.modules())

    @property
    def folded(self) -> bool:
        """Returns whether it has EDM2's layers, and `fold` has changed them."""
        return any(isinstance(layer, MPConv) and layer.folded for layer in self.modules())

    def after_step(self) -> None:
        """Normalizes EDM2's weights after an optimizer step, which keeps the effective learning rate constant.

        Source: EDM2, eq. 66.
        """
        weights = [layer.weight for layer in self.modules() if isinstance(layer, MPConv)]
        normalize_weights_(weights)

    def fold(self, lay_out: bool = True, sample: bool = True) -> None:
        """Folds normalization, gains and constants into EDM2's weights, for inference; it can no longer be trained.

        Args:
            lay_out: lay out all weights for speed too, see `lay_out_weights`, by copies.
            sample: and let passes without gradients use Winograd's convolution where it pays, see `kernels.winograd`,
                with transformed weights beside the others.
        """
        for layer, gain in gained_layers(self):
            layer.fold_(1.0 if gain is None else gain)
        if lay_out:
            lay_out_weights(self)
            if sample:
                freeze_weights(self)

    def store_convolutions(self, dtype: torch.dtype) -> None:
        """Keeps the weights of convolutions in the dtype of the activations, to which every pass would cast them.

        For a frozen network: no bit of its results changes. The layers of times and labels stay as they are.
        """
        self.rounded = dtype in (torch.float16, torch.bfloat16)
        for layer in self.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.ndim == 4:
                    setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
