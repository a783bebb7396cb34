"""Triton's kernels, by its interpreter, against torch in float64; and compiled for GPUs, as far as one can without."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.kernels.attention import attention
from edmdistill.kernels.backend import VARIABLE, kernels, selected
from edmdistill.kernels.dual import Dual
from edmdistill.kernels.group_norm import group_norm_silu
from edmdistill.kernels.magnitude import mp_weight

pytest.importorskip("triton", reason="Triton is for Linux alone")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative L2 error to float64."""


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with kernels("triton"):
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def dual(*shape: int, dtype: torch.dtype = torch.float32) -> Dual:
    return Dual(random(*shape).to(dtype), random(*shape, 1)[..., 0].to(dtype))


def by_torch(function: Any, *arguments: Any) -> Dual:
    """Returns the function of the same numbers in float64, which no Triton kernel takes."""
    wide = [Dual(x.value.double(), x.tangent.double()) if isinstance(x, Dual) else x for x in arguments]
    wide = [x.double() if isinstance(x, Tensor) else x for x in wide]
    with kernels("torch"):
        result: Dual = function(*wide)
    return result


def assert_near(found: Dual, expected: Dual) -> None:
    assert found.dtype == found.tangent.dtype
    for a, b in ((found.value, expected.value), (found.tangent, expected.tangent)):
        assert torch.linalg.vector_norm(a.double() - b) <= TOLERANCE[found.dtype] * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "last"), [((2, 8, 5, 5), False), ((1, 12, 4, 6), True), ((1, 8, 1, 1), False)])
def test_group_norm_silu(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    x = dual(*shape, dtype=dtype)
    x = Dual(x.value * 3 + 5, x.tangent)
    if last:
        x = Dual(*(side.to(memory_format=torch.channels_last) for side in (x.value, x.tangent)))
    weight, bias = random(shape[1]), random(shape[1], 1)[:, 0]
    scale, shift = (dual(*shape[:2], 1, 1, dtype=dtype) for _ in range(2))
    for modulation in ((), (scale, shift), (scale.value, shift)):
        found = group_norm_silu(x, weight, bias, 2, 1e-5, *modulation)
        assert_near(found, by_torch(group_norm_silu, x, weight, bias, 2, 1e-5, *modulation))
        assert found.value.stride() == x.value.stride()


# Triton's interpreter has no products of bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("L", "Lk", "D"), [(1, 1, 64), (16, 16, 24), (77, 77, 64), (33, 70, 128), (20, 20, 200)])
def test_attention(L: int, Lk: int, D: int, dtype: torch.dtype) -> None:
    q, k, v = dual(2, 1, L, D, dtype=dtype), dual(2, 1, Lk, D, dtype=dtype), dual(2, 1, Lk, D, dtype=dtype)
    assert_near(attention(q, k, v), by_torch(attention, q, k, v))


def test_attention_reads_any_strides() -> None:
    q, k, v = (Dual(x.value.mT, x.tangent.mT) for x in (dual(1, 2, 16, 20) for _ in range(3)))
    assert_near(attention(q, k, v), by_torch(attention, q, k, v))


def test_attention_survives_large_logits_and_a_shift_of_all_of_a_row() -> None:
    q, k, v = dual(1, 1, 40, 16), dual(1, 1, 40, 16), dual(1, 1, 40, 16)
    assert_near(attention(q * 60.0, k, v), by_torch(attention, q * 60.0, k, v))
    # dk + c moves each row of dS by q . c: the softmax does not see it.
    moved = attention(q, Dual(k.value, k.tangent + 100 * random(16)), v)
    torch.testing.assert_close(moved.tangent, attention(q, k, v).tangent, rtol=1e-3, atol=1e-3)


def test_tangents_are_linear() -> None:
    q, k, v = dual(1, 1, 9, 16), dual(1, 1, 9, 16), dual(1, 1, 9, 16)
    x, weight, bias = dual(2, 8, 3, 3), random(8), random(8)

    def scaled(x: Dual, factor: float) -> Dual:
        return Dual(x.value, x.tangent * factor)

    for function, arguments, rest in (
        (attention, (q, k, v), ()),
        (group_norm_silu, (x,), (weight, bias, 4, 1e-5)),
    ):
        once, twice, none = (function(*(scaled(y, c) for y in arguments), *rest) for c in (1.0, 2.0, 0.0))
        torch.testing.assert_close(twice.tangent, 2 * once.tangent)
        assert not none.tangent.any()


@pytest.mark.parametrize("shape", [(5, 6, 3, 3), (4, 10), (1, 1, 1, 1)])
@pytest.mark.parametrize("gained", [True, False])
def test_mp_weight_and_its_gradients(shape: tuple[int, ...], gained: bool) -> None:
    weight, slope = random(*shape).requires_grad_(), random(*shape, 1)[..., 0]
    gain = torch.tensor([0.7]).requires_grad_() if gained else 1.0
    learned = [weight, gain] if isinstance(gain, Tensor) else [weight]

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        wide = [x.detach().to(dtype).requires_grad_() for x in learned]
        y = mp_weight(*wide, factor=1.3)
        return [y, *torch.autograd.grad(y, wide, slope.to(dtype))]

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_selected_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are those of torch, so that they do not tell."""
    from edmdistill.kernels import attention_triton, group_norm_triton, magnitude_triton

    ran: list[str] = []

    def instead(module: Any, name: str, result: Tensor) -> None:
        def record(*_: Any) -> Tensor:
            ran.append(name)
            return result

        monkeypatch.setattr(module, name, record)

    instead(attention_triton, "attention_tangent", random(1, 1, 4, 4))
    instead(group_norm_triton, "group_norm_silu_tangent", random(1, 8, 2, 2))
    instead(magnitude_triton, "mp_weight", random(4, 8))
    names = ["attention_tangent", "group_norm_silu_tangent", "mp_weight"]
    for backend, expected in (("torch", []), ("triton", names)):
        with kernels(backend):
            for dtype in (torch.float64, torch.float32):  # the former stays with torch
                attention(*(dual(1, 1, 4, 4, dtype=dtype) for _ in range(3)))
                group_norm_silu(dual(1, 8, 2, 2, dtype=dtype), random(8), random(8), 2, 1e-5)
                mp_weight(random(4, 8).to(dtype))
        assert ran == expected


def test_float64_and_tensors_without_a_tangent_stay_with_torch() -> None:
    x, weight, bias = random(2, 8, 3, 3), random(8), random(8)
    y = f.silu(f.group_norm(x, 4, weight, bias, 1e-5))
    assert torch.equal(group_norm_silu(x, weight, bias, 4, 1e-5), y)


def test_what_cannot_be_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(EdmDistillError, match=r"EDMDISTILL_KERNELS is cuda: set it to torch or triton"):
        selected()
    monkeypatch.setattr("edmdistill.kernels.backend.find_spec", lambda name: None)
    with pytest.raises(EdmDistillError, match="pip install triton"), kernels("triton"):
        pass
    assert os.environ[VARIABLE] == "cuda"  # a context that failed leaves nothing behind


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edmdistill.kernels.attention_triton import STAGES, TILES, attention_kernel
from edmdistill.kernels.group_norm_triton import group_norm_silu_kernel
from edmdistill.kernels.magnitude_triton import mp_weight_backward_kernel, mp_weight_kernel

def compile(kernel, gpu, types, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(name),): x for name, x in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_stages": STAGES})
    assert "cubin" in compiled.asm
    return compiled.metadata.shared

for gpu in (80, 90):
    images = dict.fromkeys(("X", "DX", "Y", "DY"), "*bf16")
    rows = dict.fromkeys(("W", "B", "SCALE", "SHIFT", "DSCALE", "DSHIFT"), "*fp32")
    compile(group_norm_silu_kernel, gpu, {**images, **rows, "eps": "fp32"}, MODULATED=True, LAST=True, BLOCK=2048)
    weights = dict.fromkeys(("W", "GAIN", "Y", "NORM", "DY", "DW", "DGAIN"), "*fp32") | {"c": "fp32"}
    for kernel in (mp_weight_kernel, mp_weight_backward_kernel):
        compile(kernel, gpu, weights, BLOCK=2048)
    for dtype, size in (("*fp16", 2), ("*fp32", 4)):
        for padded, (rows, keys) in TILES[size].items():
            types = dict.fromkeys(("Q", "K", "V", "DQ", "DK", "DV", "Y", "DY"), dtype) | {"scale": "fp32"}
            shared = compile(attention_kernel, gpu, types, PADDED=padded, ROWS=rows, KEYS=keys)
            assert shared <= 99 * 1024, (gpu, dtype, padded, shared)
"""


@pytest.mark.slow
def test_they_compile_for_gpus_without_one() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environ, check=True)
