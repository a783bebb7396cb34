"""What the reports of conversions say."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from edmdistill.checkpoints.config import CheckpointConfig, read_config
from edmdistill.checkpoints.conversion_report import ConversionReport, GeneratorReport, ParityRow
from edmdistill.checkpoints.encoder import UNRECORDED

PATH = Path("out")


@pytest.fixture
def config() -> CheckpointConfig:
    config = read_config(Path(__file__).parent / "format-1.0")
    return replace(config, stage="teacher", method=None, noise_dependence=0.1)


def test_the_licence_and_the_source_as_they_are_known(config: CheckpointConfig) -> None:
    said = ConversionReport(PATH, config, ()).describe("edm.pkl")
    assert said.startswith("edm.pkl: edm2, 4x4 pixels, 3 classes, preconditioned as edm.\n")
    assert said.endswith("out is written: a teacher in TrigFlow, under the licence cc-by-nc-sa-4.0.")
    unknown = replace(config, provenance=replace(config.provenance, licence=None, source="a\u00adb"))
    said = ConversionReport(PATH, unknown, ()).describe("edm.pkl")
    assert said.startswith("a\\xadb: edm2")
    assert said.endswith("under no known licence (--licence names one).")


def test_latents_are_not_called_pixels(config: CheckpointConfig) -> None:
    latent = replace(config, encoder=UNRECORDED.encoder(config.sigma_data))
    assert ConversionReport(PATH, latent, ()).describe("edm.pkl").startswith("edm.pkl: edm2, 4x4 latents, 3 classes,")


def test_a_conversion_that_was_there_says_nothing_else(config: CheckpointConfig) -> None:
    said = ConversionReport(PATH, config, (), written=False).describe("edm.pkl")
    assert said == "out holds the conversion of edm.pkl already: nothing was done."


@pytest.mark.parametrize("float64", [2e-13, None])
def test_differences_are_a_table_of_what_was_measured(config: CheckpointConfig, float64: float | None) -> None:
    rows = ParityRow(80.0, 1e-6, float64), ParityRow(0.002, 3e-7, float64)
    said = ConversionReport(PATH, config, rows).describe("edm.pkl").splitlines()
    table = [line.split() for line in said if line.startswith("    ")]
    more = [] if float64 is None else ["2.0e-13"]
    assert table == [
        ["sigma", "float32", *["float64"] * len(more)],
        ["80", "1.0e-06", *more],
        ["0.002", "3.0e-07", *more],
    ]


def test_a_network_that_reads_t_is_to_be_trained_on(config: CheckpointConfig) -> None:
    assert "train diffusion" not in ConversionReport(PATH, config, ()).describe("edm.pkl")
    network = replace(config.network, arguments=config.network.arguments | {"positional_time": True})
    said = ConversionReport(PATH, replace(config, network=network), ()).describe("edm.pkl").splitlines()
    assert said[-3:] == [
        "It is another function than its source. To train it on, and to see whether it is as good again:",
        "  edmdistill train diffusion out --data DATA --recipe RECIPE --run-dir RUN",
        "  edmdistill loss RUN edm.pkl --data DATA",
    ]


def test_a_generator_says_where_it_starts(config: CheckpointConfig) -> None:
    said = GeneratorReport(PATH, replace(config, method="sid", sigma_max=2.5)).describe("sid.pkl").splitlines()
    assert said == [
        "sid.pkl: edm2, 4x4, 3 classes, a generator by sid that starts at sigma 2.5.",
        "out is written, for sample, eval and compare, under the licence cc-by-nc-sa-4.0.",
    ]
