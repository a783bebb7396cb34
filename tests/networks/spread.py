"""A pass with tangents and gradient through DDP, and of sharded weights (FSDP2): up to rounding the network's own.

Both ranks of a world of two run it.
"""

import copy

import torch
from conftest import random_flow
from tolerance import assert_rounded, depth
from torch import Tensor
from torch.distributed.tensor import DTensor

from edmdistill.machine.engine import Engine, Machine
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
        expected = alone(*point, along=along, u_at=(t,), w=w)
        loss(*expected, alone(*point)).backward()
        average = {name: engine.all_reduce(p.grad) / 2 for name, p in alone.named_parameters() if p.grad is not None}
        for engine.mesh in (None, mesh):
            flow = copy.deepcopy(alone)
            engine.place(flow)
            module = engine.wrap(flow, trained=True)
            for _ in range(2):  # the second time, gradients are there
                torch.manual_seed(1)
                found = module(*point, along=along, u_at=(t,), w=w)
                for tensor, own in zip(found, expected, strict=True):
                    assert_rounded(tensor, own, depth(alone))  # a shard's weights lie within a buffer
                loss(*found, module(*point)).backward()  # a turn may ask twice
            engine.finish_gradients(flow)
            gradients = {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}
            assert gradients.keys() == average.keys()
            for name, gradient in gradients.items():
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                assert_rounded(whole, 2 * average[name], depth(alone))
    engine.close()


def loss(F: Tensor, dF: Tensor, u: Tensor, again: Tensor) -> Tensor:
    return (F - F.detach() - dF).square().sum() + u.sum() + again.sum()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
