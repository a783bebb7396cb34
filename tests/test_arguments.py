"""Wrong types and shapes at the public functions: one sentence that says what is needed, or what is obviously meant."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny_generator import tiny_generator
from torch import Tensor

import edmdistill
from edmdistill import EdmDistillError, SamplerSpec, arguments
from edmdistill.checkpoints.generator import Generator
from edmdistill.networks.flow import Denoiser

X = torch.randn(2, 1, 8, 8)
UINT8 = np.zeros((2, 1, 8, 8), np.uint8)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return edmdistill.load_generator(tiny_generator(tmp_path_factory.mktemp("source") / "generator"))


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return edmdistill.load_denoiser(tiny_generator(tmp_path_factory.mktemp("source") / "teacher", stage="teacher"))


LOADING: dict[str, Callable[[], object]] = {
    "dtype = 'fp16' must be a torch.dtype such as torch.bfloat16, 'auto' or None": lambda: edmdistill.load_generator(
        "x",
        dtype="fp16",  # type: ignore[arg-type]
    ),
    "cannot compute in torch.int32: choose one of": lambda: edmdistill.load_generator("x", dtype=torch.int32),
    "there is no device 'gpu' here: use cpu, cuda, or cuda:N": lambda: edmdistill.load_generator("x", "gpu"),
    "load_denoiser: source = None must be a string or a path": lambda: edmdistill.load_denoiser(None),  # type: ignore
    "load_features: name = ['pixels'] must be a string": lambda: edmdistill.load_features(["pixels"]),  # type: ignore
    "there is no device 'tpu'": lambda: edmdistill.load_features("digits", device="tpu"),
    "must be a string, a path or None": lambda: edmdistill.load_features("digits", 3),  # type: ignore[arg-type]
    "not (a numpy array, uint8 [2, 1, 8, 8])": lambda: edmdistill.load_features("digits")(UINT8),  # type: ignore
    "not (a tensor, float32 [2, 1, 8, 8])": lambda: edmdistill.load_features("pixels")(X),
    "convert: out = 3 must be a string or a path": lambda: edmdistill.convert("x", 3),  # type: ignore[arg-type]
    "parity = 'fast' must be 'full' or 'quick' or 'none'": lambda: edmdistill.convert("x", "y", parity="fast"),  # type: ignore
    "evaluate: protocol = None must be a string": lambda: edmdistill.evaluate("x", protocol=None),  # type: ignore
    "evaluate: reference = 3 must be an edmdistill.data": lambda: edmdistill.evaluate("x", 3, protocol="pixels"),  # type: ignore
    "SamplerSpec: nfe = '2' must be a whole number": lambda: SamplerSpec(nfe="2"),  # type: ignore[arg-type]
    "SamplerSpec: churn = 40 must be an edmdistill.sampling.heun.Churn": lambda: SamplerSpec(churn=40),  # type: ignore
}


@pytest.mark.parametrize("sentence", LOADING)
def test_what_is_loaded(sentence: str) -> None:
    with pytest.raises(EdmDistillError) as caught:
        LOADING[sentence]()
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "x"}, "model = 'x' must be a network of load_generator or a network of load_denoiser"),
        ({"seeds": 3}, "seeds = 3 must be a list of whole numbers"),
        ({"seeds": "0-3"}, "seeds = '0-3' must be a list of whole numbers"),
        ({"seeds": torch.ones(2)}, "seeds = (a tensor, float32 [2]) must be a list of whole numbers"),
        ({"nfe": 2.0}, "nfe = 2.0 must be a whole number or None"),
        ({"gamma": "1"}, "gamma = '1' must be a number or None"),
        ({"labels": ["cat"]}, "labels = ['cat'] must be a whole number, a list of whole numbers, a tensor or None"),
        ({"on_progress": 3}, "on_progress = 3 must be a function or None"),
        ({"seeds": []}, "there is nothing to sample: pass at least one seed"),
        (
            {"force_guidance": True, "guidance": 2.0},
            "force_guidance is for teachers, and this is a generator: leave it",
        ),
        ({"batch": 0}, "a batch must hold at least 1 image, but it is 0"),
        ({"force_guidance": "no"}, "force_guidance = 'no' must be True or False"),
    ],
    ids=str,
)
def test_sample(generator: Generator, options: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"model": generator, "nfe": 1, "seeds": [0]} | options
    with pytest.raises(EdmDistillError) as caught:
        edmdistill.sample(**given)
    assert sentence in str(caught.value)


CALLS: dict[str, tuple[object, ...]] = {
    "the images (a numpy array, float32 [2, 1, 8, 8]) must be a tensor of floats, [B,1,H,W]": (X.numpy(), 1.0),
    "the images (a tensor, float32 [1, 8, 8]) must be": (X[0], 1.0),
    "the images (a tensor, float32 [2, 3, 8, 8]) must be": (torch.zeros(2, 3, 8, 8), 1.0),
    "the images (a tensor, int64 [2, 1, 8, 8]) must be": (X.long(), 1.0),
    "= (a tensor, float32 [3]) must be a number, or 2, one for each image": (X, torch.ones(3)),
    "= '1' must be a number": (X, "1"),
    "= -1 must be": (X, -1.0),
    "= nan must be": (X, float("nan")),
    "= inf must be": (X, float("inf")),
    "labels = 'cat' are no classes, which are numbers from 0": (X, 1.0, "cat"),
    "class 10 does not exist": (X, 1.0, [1, 10]),
    "labels of shape [3] do not fit 2 samples": (X, 1.0, torch.tensor([1, 2, 3])),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_a_network_is_called(generator: Generator, denoiser: Denoiser, sentence: str) -> None:
    for network in (generator, denoiser):
        with pytest.raises(EdmDistillError) as caught:
            network(*CALLS[sentence])
        assert sentence in str(caught.value)


@torch.no_grad()
def test_what_is_obviously_meant(generator: Generator, denoiser: Denoiser) -> None:
    numbers = torch.tensor([1, 2])
    for network in (generator, denoiser):
        for level, labels in (([1.0, 1.0], [1, 2]), (1, np.array([1, 2])), (torch.ones(2), numbers)):
            assert torch.equal(network(X, level, labels), network(X, torch.tensor(1.0), numbers))
        assert torch.equal(network(X, 1.0, 3), network(X, 1.0, [3, 3]))
    assert torch.equal(denoiser.round_sigma([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert torch.equal(denoiser.logvar(1.0), denoiser.logvar(torch.tensor(1.0)))
    seeds = edmdistill.sample(generator, nfe=1, seeds=np.arange(2))
    assert torch.equal(edmdistill.sample(generator, nfe=1, seeds=torch.arange(2)), seeds)
    with pytest.raises(EdmDistillError, match="trained for no range of guidance weights: leave w out"):
        generator(X, 1.0, None, 2.0)
    with pytest.raises(EdmDistillError, match="must be at least 1, but it is 0"):
        generator.schedule(0)
    with pytest.raises(EdmDistillError, match=r"t = 80 must be in \[0, pi/2\]; edmdistill.trigflow.sigma_to_time"):
        generator(X, 80)
    with pytest.raises(EdmDistillError, match="sigma = 0 must be above 0"):
        denoiser.logvar(0)
    with pytest.raises(EdmDistillError, match=r"the guide computes in torch.float64 on cpu"):
        edmdistill.sample(denoiser, seeds=[0], guidance=2.0, guide=copy.deepcopy(denoiser).double())


def test_images_that_the_network_cannot_halve() -> None:
    teacher = edmdistill.load_denoiser("digits")
    assert teacher(torch.zeros(1, 1, 4, 8), 1.0).shape == (1, 1, 4, 8)
    for size in ((6, 8), (8, 2), (0, 8)):
        with pytest.raises(EdmDistillError, match="must have a height and a width that are multiples of 4"):
            teacher(torch.zeros(1, 1, *size), 1.0)


@torch.no_grad()
def test_numbers_go_where_the_network_is(generator: Generator, denoiser: Denoiser) -> None:
    there = copy.deepcopy(denoiser).to("meta")
    assert there.logvar(1.0).is_meta
    assert there(X.to("meta"), 1.0).is_meta
    assert copy.deepcopy(generator).to("meta")(X.to("meta"), 1.0).is_meta


@torch.no_grad()
def test_no_images_are_no_images(generator: Generator, denoiser: Denoiser) -> None:
    for network in (generator, denoiser):
        assert network(X[:0], 1.0, torch.zeros(0, dtype=torch.int64)).shape == X[:0].shape


def test_numbers_of_numpy_are_python_s(generator: Generator) -> None:
    spec = SamplerSpec(nfe=np.int64(2), gamma=np.float32(0.5))  # type: ignore[arg-type]
    assert (type(spec.nfe), type(spec.gamma)) == (int, float)
    result = edmdistill.evaluate(
        generator, "digits", protocol="pixels", sampler=spec, seeds=np.arange(4), repeat=np.int64(1)
    )  # type: ignore
    assert (result.protocol.seeds, result.protocol.repeat) == ("0-3", 1)


def test_an_unknown_name_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match=r"sample\(\) got an unexpected keyword argument 'steps'"):
        edmdistill.sample(None, steps=3)  # type: ignore


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, np.int64(2)], [True, 1.5, "1", None]),
        (float, [1, 1.5, np.float32(2)], [True, "1", None]),
        (int | None, [None, 1], ["1"]),
        (Literal["a", 1], ["a", 1], ["b", True]),
        (Sequence[int], [[1], (1, 2), range(3), np.arange(2), torch.arange(2), []], ["12", b"1", 1, {1}, [1.5]]),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [1]]),
        (Callable[[int], object], [print, int], [3, "print"]),
        (Tensor, [torch.ones(1)], [np.ones(1), [1.0]]),
        (str | Path, ["a", Path("a")], [b"a", None]),
        (Any, [None, 3], []),
    ],
)
def test_types(hint: Any, good: list[object], bad: list[object]) -> None:
    assert [arguments.fits(value, hint) for value in good] == [True] * len(good)
    assert [arguments.fits(value, hint) for value in bad] == [False] * len(bad)
