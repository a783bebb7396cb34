import pytest
import torch

from edmdistill.networks import NETWORKS
from edmdistill.networks.initial import normal

SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4, "model_channels": 32}
CASES = {
    "song": SONG | {"embedding_type": "fourier", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2},
    "adm": SONG,
    "edm2": {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 64},
}


def test_they_are_normal_numbers() -> None:
    torch.manual_seed(0)
    numbers = normal(100, 100, std=3)
    torch.manual_seed(0)
    assert torch.equal(numbers, 3 * torch.randn(100, 100))


@pytest.mark.parametrize("positional", [False, True], ids=["c_noise", "t"])
@pytest.mark.parametrize("kind", CASES)
def test_an_outline_draws_nothing(kind: str, positional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch imports its compiler for this")

    for place, name in ((torch, "randn"), (torch, "rand"), (torch.Tensor, "normal_"), (torch.Tensor, "__mul__")):
        monkeypatch.setattr(place, name, draw)
    with torch.device("meta"):
        network = NETWORKS[kind](**CASES[kind], logvar_channels=8, positional_time=positional)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
