"""Options that measure a GPU. That commands refuse them on a CPU is tested in faults/test_devices.py."""

import pytest
import torch

from edmdistill.errors import TrainingError
from edmdistill.machine.gpu_options import NEED_GPU, require_gpu


@pytest.mark.parametrize("option", NEED_GPU)
def test_a_cpu_is_refused_with_what_to_do(option: str) -> None:
    require_gpu(torch.device("cuda:1"), option)
    with pytest.raises(TrainingError) as error:
        require_gpu(torch.device("cpu"), option)
    assert str(error.value) == f"{option} needs a GPU, but this run is on the CPU: {NEED_GPU[option]}"
