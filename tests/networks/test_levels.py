"""The plan of a U-Net: every skip connection is used once, and channels fit."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from edmdistill.networks.levels import UNetLevels

LEVELS = st.builds(
    UNetLevels,
    img_resolution=st.just(64),
    channels=st.sampled_from([32, 96]),
    widths=st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=5),
    num_blocks=st.integers(0, 3),
    attn_resolutions=st.lists(st.sampled_from([64, 32, 8]), max_size=2),
)


@settings(max_examples=50)
@given(LEVELS, st.booleans())
def test_channels_fit(levels: UNetLevels, attend_last: bool) -> None:
    encoder = [layer for layers in levels.encoder() for layer in layers]
    for before, layer in pairwise(encoder):
        assert layer.in_channels == before.out_channels
    skips, channels = [layer.out_channels for layer in encoder], encoder[-1].out_channels
    for layers in levels.decoder(attend_last):
        for layer in layers:
            skip = skips.pop() if layer.role.startswith("block") else 0
            assert layer.in_channels == channels + skip
            channels = layer.out_channels
    assert not skips


@settings(max_examples=50)
@given(LEVELS)
def test_resolutions_halve_and_return(levels: UNetLevels) -> None:
    down = [layers[0].resolution for layers in levels.encoder()]
    assert down == [64 >> level for level in range(len(levels.widths))]
    assert [layers[-1].resolution for layers in levels.decoder()] == down[::-1]
    names = [layer.name for layers in levels.encoder() for layer in layers]
    assert names[0] == "64x64_conv"
    assert len(names) == len(set(names)) == len(levels.widths) * (levels.num_blocks + 1)


@settings(max_examples=50)
@given(LEVELS)
def test_attention(levels: UNetLevels) -> None:
    every = [layer for layers in levels.decoder() for layer in layers]
    last = [layer for layers in levels.decoder(attend_last=True) for layer in layers]
    for layer in every:
        listed = layer.role.startswith("block") and layer.resolution in levels.attn_resolutions
        assert layer.attention == (listed or layer.role == "in0")
    assert {layer.name for layer in last if layer.attention} == {
        layer.name for layer in every if layer.attention and layer.role in ("in0", f"block{levels.num_blocks}")
    }
