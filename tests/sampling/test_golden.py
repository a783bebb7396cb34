"""The official samplers with the official networks, seed for seed: every golden file that holds samples."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from golden_set import GOLDEN
from safetensors.torch import load_file
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.guidance import GuidedDenoiser
from edmdistill.sampling.heun import EDM2_SAMPLER, EDM_SAMPLER, Churn, edm_sampler
from edmdistill.sampling.seeds import SeededNoise

FACTS = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}
SAMPLED = [
    (name, key) for name, facts in FACTS.items() for key in ("sampler", "churn") if key in facts and "pickle" in facts
]
GUIDED = [
    (name, key) for name in FACTS if name.startswith("guided-") for key in ("unguided", "guided", "guided_f64", "churn")
]
TOLERANCE = 2e-5  # of the largest value; the golden set allows 1e-4


@cache
def load(name: str) -> Denoiser:
    path = GOLDEN / name
    return load_denoiser(path if path.exists() else path.with_name(f"{name}.gz"))


def churn_of(case: dict[str, Any]) -> Churn:
    return Churn(case.get("S_churn", 0), case.get("S_min", 0), case.get("S_max", float("inf")), case.get("S_noise", 1))


def recorded(noise: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The official draws; where none count and none are kept, zeros."""
    draws = iter(noise if noise is not None else ())
    return lambda x: next(draws, torch.zeros_like(x)) if noise is None else next(draws)


def assert_samples_close(x: Tensor, expected: Tensor) -> None:
    assert x.dtype == expected.dtype
    torch.testing.assert_close(x, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def assert_bytes_close(x: Tensor, expected: Tensor) -> None:
    assert (to_uint8(x).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("name", "key"), SAMPLED)
def test_edm(name: str, key: str) -> None:
    facts, tensors = FACTS[name], load_file(GOLDEN / f"{name}.safetensors")
    case = facts[key]
    denoiser = load(facts["pickle"])
    latents, labels = tensors[f"{key}.latents"], tensors.get(f"{key}.labels")

    rng = SeededNoise(case["seeds"])
    # torch takes the logarithms and cosines of normal numbers by the processor's vector units.
    assert_rounded(rng.normal(latents.shape[1:]), latents, 10)
    assert labels is None or torch.equal(rng.integers(denoiser.label_dim), labels.argmax(1))

    sigmas: list[Tensor] = []
    hook = denoiser.register_forward_pre_hook(lambda module, args: sigmas.append(args[1]))
    noise = tensors.get(f"{key}.noise")
    churn, steps = churn_of(case), case["num_steps"]
    with torch.no_grad():
        grid = EDM_SAMPLER.sigmas(denoiser, steps)
        x = edm_sampler(denoiser, latents, labels, sigmas=grid, churn=churn, randn_like=recorded(noise))
    hook.remove()
    assert_samples_close(x, tensors[f"{key}.x"])
    torch.testing.assert_close(torch.stack(sigmas), tensors[f"{key}.net_sigmas"], rtol=2e-6, atol=0)
    assert_bytes_close(x, tensors[f"{key}.images_u8"])


@pytest.mark.parametrize(("name", "key"), GUIDED)
def test_edm2(name: str, key: str) -> None:
    facts, tensors = FACTS[name], load_file(GOLDEN / f"{name}.safetensors")
    case = facts[key]
    main, guide = load(facts["net"]), load(facts["gnet"])
    weight = case.get("guidance", 1)
    sigmas: list[Tensor] = []
    hook = main.register_forward_pre_hook(lambda module, args: sigmas.append(args[1]))
    steps, churn = case["num_steps"], churn_of(case)
    with torch.no_grad():
        x = edm_sampler(
            main if weight == 1 else GuidedDenoiser(main, weight, guide),
            tensors["noise"],
            tensors["labels"],
            sigmas=replace(EDM2_SAMPLER, dtype=getattr(torch, case.get("dtype", "float32"))).sigmas(main, steps),
            churn=churn,
            always_draws=False,
            randn_like=recorded(tensors.get(f"{key}.noise")),
        )
    hook.remove()
    assert_samples_close(x, tensors[f"{key}.x"])
    torch.testing.assert_close(torch.stack(sigmas), tensors[f"{key}.net_sigmas"], rtol=2e-6, atol=0)
    if f"{key}.images_u8" in tensors:
        assert_bytes_close(x, tensors[f"{key}.images_u8"])


CHURNED = [case for case in SAMPLED + GUIDED if case[1] == "churn"]


@pytest.mark.parametrize(("name", "key"), CHURNED)
def test_by_seed_alone(name: str, key: str) -> None:
    """`sample` draws noise, classes and the churn's noise itself, and ends at the same picture."""
    facts, tensors = FACTS[name], load_file(GOLDEN / f"{name}.safetensors")
    case = facts[key]
    x = sample(
        load(facts.get("pickle") or facts["net"]),
        2 * case["num_steps"] - 1,
        seeds=case.get("seeds") or facts["seeds"],
        guidance=case.get("guidance", 1.0),
        guide=load(facts["gnet"]) if "gnet" in facts else None,
        churn=churn_of(case),
    )
    expected = tensors[f"{key}.x"].float()
    bound = float(expected.abs().max())
    torch.testing.assert_close(x, expected.clamp(-1, 1) if len(x[0]) == 3 else expected, rtol=0, atol=TOLERANCE * bound)


def test_every_kind_of_golden_sample_is_here() -> None:
    assert {name for name, _ in GUIDED} == {"guided-latent", "guided-rgb"}
    assert {"sampler", "churn"} == {key for _, key in SAMPLED}
    assert len({name for name, _ in SAMPLED}) >= 5
