"""An adapter that does not fit the model is an error before anything is encoded, which may take hours."""

import pytest
import torch
from helpers.project import BASE
from safetensors.torch import save_file

from data.precompute import build

CASES = {
    "targets": (["--adapter.targets=no_such_layer"], "--adapter.targets"),
    "option of another algorithm": (["--adapter.block_size=16"], "block_size = 16"),
    "tracker without its package": (["--tracking.report_to=aim"], "Use pip install aim"),
    "rank": (["--adapter.init=pissa", "--rank=500"], "rank 500"),
    "file that is no adapter": (["--existing_lora={file}"], "--existing_lora {file}"),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_encoded(case, options, run_here, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise AssertionError("encoding began")

    monkeypatch.setattr(build, "encode_captions", fail)
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, file)
    arguments, message = CASES[case]
    arguments = [argument.format(file=file) for argument in arguments]
    fresh = [*options, f"--data.cache_dir={tmp_path / 'cache'}"]
    assert run_here([*fresh, *arguments]) == 2
    assert message.format(file=file) in capsys.readouterr().err


def test_a_model_is_not_an_adapter(options, run_here, capsys):
    """One line, instead of one for each of its hundreds of tensors."""
    file = BASE / "unet" / "diffusion_pytorch_model.safetensors"
    assert run_here([*options, f"--existing_lora={file}"]) == 2
    said = capsys.readouterr().err
    assert f"--existing_lora {file}: is not an adapter of this model" in said
    assert len(said.splitlines()) == 1
