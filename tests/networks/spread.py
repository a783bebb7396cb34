"""Tangents of a network that DDP wraps, and of one that FSDP2 shards: up to rounding those of the network alone.

Both ranks of a world of two run it.
"""

import copy

import torch
from conftest import random_flow
from tolerance import assert_rounded, depth

from edmdistill.machine.engine import Engine, Machine, local_shard
from edmdistill.networks.surgery.rebuild import add_guidance, add_logvar


def main() -> None:
    engine = Engine(Machine(device="cpu", shard=True))
    mesh = engine.mesh
    x, dx = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(engine.rank))
    t, dt = torch.tensor([0.3, 0.8, 1.3]).double(), torch.ones(3).double()
    w = torch.tensor([1.0, 1.5, 2.0])
    for case in ("ddpmpp-vp", "adm", "edm2"):
        alone = add_guidance(add_logvar(random_flow(case, dropout=0.3), seed=0)).train()
        torch.nn.init.normal_(alone.network.map_guidance.weight)
        channels, labels = alone.img_channels, torch.eye(5)[:3] if alone.label_dim else None
        point, along = (x[:, :channels], t, labels), (dx[:, :channels], dt)
        torch.manual_seed(1)
        expected = alone.tangent(*point, *along, w=w)
        for engine.mesh in (None, mesh):
            flow = copy.deepcopy(alone)
            engine.place(flow)
            module = engine.wrap(flow, trained=True)
            for _ in range(2):  # the second time, gradients are there
                torch.manual_seed(1)
                F, dF = module.tangent(*point, *along, w=w)
                for found, own in zip((F, dF), expected, strict=True):
                    assert_rounded(found, own, depth(alone))  # a shard's weights lie within a buffer
                learned, u = module(*point, u_at=(t,), w=w)
                assert_rounded(learned, F, depth(alone))
                again = module(*point)  # a turn may ask twice
                ((learned - F - dF).square().sum() + u.sum() + again.sum()).backward()
            engine.finish_gradients(flow)
            assert engine.gradient_norm(flow) > 0, case
            for layer in flow.network.logvar_linear, flow.network.map_guidance:
                assert engine.all_reduce(local_shard(layer.weight.grad).abs().sum()) > 0, case
    engine.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
