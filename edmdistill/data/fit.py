"""Checks that a data set fits a network."""

from __future__ import annotations

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.encoder import LatentEncoder, latent_encoder
from edmdistill.data.datasets import Dataset
from edmdistill.data.latents import channel_statistics
from edmdistill.errors import DatasetError, counted
from edmdistill.networks.flow import FlowNetwork


def require_fit(dataset: Dataset, flow: FlowNetwork, config: CheckpointConfig) -> None:
    """Checks that the network takes the data, and orders their classes as in the network.

    Raises: DatasetError: the shapes differ, or the data have no classes, or others than the network.
    """

    def words(latent: bool, size: int, channels: int, classes: int) -> str:
        kind, among = "latents" if latent else "images", counted(classes, "class") if classes else "no classes"
        return f"{kind} of {size}x{size} with {counted(channels, 'channel')} and {among}"

    scaling = latent_encoder(config.encoder)
    has = dataset.latent, dataset.img_resolution, dataset.img_channels
    needs = scaling is not None, flow.img_resolution, flow.img_channels
    if has != needs:
        raise DatasetError(
            f"the data {dataset.name} are {words(*has, dataset.label_dim)}, but the network takes "
            f"{words(*needs, flow.label_dim)}: give those"
        )
    dataset.use_classes(flow.label_dim, config.label_names)
    if scaling is not None:
        _require_same_vae(dataset, scaling)
        _note_other_statistics(dataset, scaling, flow.sigma_data)


def _note_other_statistics(dataset: Dataset, scaling: LatentEncoder, sigma_data: float) -> None:
    """Notes where the latents' mean or standard deviation, by channel, is far from what the network was trained on."""
    some = dataset.tensors(range(0, len(dataset), max(1, len(dataset) // 64)))[0]
    measured = channel_statistics(some)
    for channel, (mean, std, scale, bias) in enumerate(zip(*measured, scaling.scale, scaling.bias, strict=True)):
        mean, std = mean * scale + bias, std * scale
        if abs(mean) > 3 * sigma_data or not 1 / 3 < std / sigma_data < 3:
            dataset.note(
                f"{dataset.name}: channel {channel} of the latents has mean {mean:.3g} and deviation {std:.3g} by the "
                f"teacher's scale, which was trained on 0 and {sigma_data:g}: they were scaled already, or are of "
                "another VAE."
            )
            return


def _require_same_vae(dataset: Dataset, encoder: LatentEncoder) -> None:
    """Raises: DatasetError: the latents were made from pixels in another range, or by another VAE."""
    encoding = dataset.encoding
    if encoding is None:
        return
    if encoding.range != encoder.range:
        pixels = {"edm2": "[0, 1]", "scm": "[-1, 1]"}
        raise DatasetError(
            f"{dataset.name} holds latents of pixels in {pixels[encoding.range]} ({encoding.range}), but the "
            f"network takes those of pixels in {pixels[encoder.range]}: encode the images again by `edmdistill data "
            f"encode --range {encoder.range}`"
        )
    digests = encoding.vae_sha256, encoder.vae_sha256
    if None not in digests and len(set(digests)) > 1:
        raise DatasetError(
            f"{dataset.name} holds latents of the VAE {encoding.vae_name} (sha256 {str(digests[0])[:12]}), but the "
            f"network takes those of {encoder.vae_name} ({str(digests[1])[:12]}): encode the images again with that one"
        )
