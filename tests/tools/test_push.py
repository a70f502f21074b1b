"""`push`: the folder for the Hub, and what is said if it cannot be uploaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_hub import TOKEN as HUB_TOKEN
from helpers.fake_hub import FakeHub, fake_hub
from helpers.project import PROJECT
from helpers.run_folders import write_facts, write_run, write_samples
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import train_lora
from common.hub import repo_error

TOKEN = "hf_doNotPrintMe0123456789"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of a Hub model with trigger words."""
    formats = {"name": "lora", "formats": ["diffusers", "kohya", "peft"]}
    folder = write_run(tmp_path / "sks dog", model={"path": "org/base-model"}, export=formats)
    write_samples(folder, [100, 200])
    write_facts(folder, ['a cat: "x" <b>', "sks dog"], trigger_words="sks dog", num_trained=12)
    for name in ("lora", "lora.kohya", "lora.raw", "lora-step00000100"):
        (folder / f"{name}.safetensors").write_bytes(b"weights")
    (folder / "lora.peft").mkdir()
    (folder / "lora.peft" / "adapter_config.json").write_text("{}")
    return folder


def push(folder: Path, *words: str) -> int:
    return train_lora.main(["push", str(folder), "--repo", "me/dog", *words])


def test_the_folder(finished, capsys):
    assert push(finished, "--license", "mit", "--no_upload") == 0
    assert f"hf upload me/dog '{finished / 'hub'}' --private" in capsys.readouterr().out
    names = sorted(path.name for path in (finished / "hub").iterdir())
    assert names == [
        "README.md",
        "lora-step00000200_00.png",
        "lora-step00000200_01.png",
        "lora.kohya.safetensors",
        "lora.peft",
        "lora.safetensors",
    ]
    card = ModelCard((finished / "hub" / "README.md").read_text())
    data = card.data.to_dict()
    assert (data["base_model"], data["license"]) == ("org/base-model", "mit")
    assert data["instance_prompt"] == "sks dog"
    assert [entry["text"] for entry in data["widget"]] == ['a cat: "x" <b>', "sks dog"]
    for entry in data["widget"]:
        assert (finished / "hub" / entry["output"]["url"]).is_file()
    assert 'load_lora_weights("me/dog", weight_name="lora.safetensors")' in card.content
    assert 'from_pretrained("org/base-model"' in card.content
    assert "trained on 12 images" in card.content


def test_a_run_without_samples_shows_its_preview(tmp_path):
    folder = write_run(
        tmp_path / "run", algorithm="LoHa", model={"path": "/home/bob/sd.safetensors"}
    )
    (folder / "lora.safetensors").write_bytes(b"weights")
    (folder / "preview.png").write_bytes(b"picture")
    assert push(folder, "--no_upload") == 0
    card = (folder / "hub" / "README.md").read_text()
    assert "(preview.png)" in card
    assert "bob" not in card
    assert "for sd.safetensors" in card
    assert "load_lora_weights" not in card, "diffusers loads no LoHa"


def test_mistakes(tmp_path, finished, capsys):
    assert push(tmp_path, "--no_upload") == 2
    assert "holds no run" in capsys.readouterr().err
    assert train_lora.main(["push", str(finished), "--repo", "dog"]) == 2
    assert "--repo dog: expected user/name" in capsys.readouterr().err
    for path in finished.glob("lora*"):
        path.rename(finished / f"other_{path.name}")
    assert push(finished, "--no_upload") == 2
    assert "has no adapter yet" in capsys.readouterr().err


def test_an_edited_card_is_kept_and_other_adapters_are_not_taken(finished, capsys):
    (finished / "lora_client2.safetensors").write_bytes(b"weights")
    assert push(finished, "--no_upload") == 0
    assert not (finished / "hub" / "lora_client2.safetensors").exists()
    (finished / "hub" / "README.md").write_text("mine")
    assert push(finished, "--no_upload") == 0
    assert "is kept" in capsys.readouterr().out
    assert (finished / "hub" / "README.md").read_text() == "mine"


def test_a_local_model_is_no_model_of_the_hub(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base-model").mkdir(parents=True)
    assert push(finished, "--no_upload") == 0
    card = ModelCard((finished / "hub" / "README.md").read_text())
    assert card.data.base_model is None


def test_only_a_folder_of_peft(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "lora.peft").mkdir()
    (folder / "config.yaml").write_bytes(b"\xff")
    assert push(folder, "--no_upload") == 0
    card = (folder / "hub" / "README.md").read_text()
    assert "`lora.peft` is a folder of PEFT" in card
    assert "preview.png" not in card


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({}, "no token of the Hub"),
        ({"HF_TOKEN": TOKEN}, "not uploaded: "),  # nobody listens at the address
    ],
)
def test_what_cannot_be_uploaded_is_written(variables, reason, finished, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        **variables,
    }
    words = [sys.executable, "train_lora.py", "push", str(finished), "--repo", "me/dog"]
    result = subprocess.run(
        words, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert reason in result.stderr
    assert f"hf upload me/dog '{finished / 'hub'}' --private" in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert (finished / "hub" / "README.md").is_file()
    assert TOKEN not in json.dumps(
        [path.read_text(errors="replace") for path in (finished / "hub").glob("*.md")]
    )


def online(hub: FakeHub, home: Path, token: str = HUB_TOKEN) -> dict[str, str]:
    """An environment in which a server on this computer is the Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**environment, "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": token}


def launched(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_lora.py", *words]
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_folder_is_uploaded(finished, tmp_path):
    with fake_hub() as hub:
        result = launched(
            ["push", str(finished), "--repo", "me/dog"], online(hub, tmp_path / "home")
        )
    assert result.returncode == 0, result.stderr
    assert "uploaded to https://huggingface.co/me/dog" in result.stdout
    assert hub.created["visibility"] == "private"
    assert hub.files["lora.safetensors"] == b"weights"
    assert hub.files.keys() == {
        str(path.relative_to(finished / "hub"))
        for path in (finished / "hub").rglob("*")
        if path.is_file()
    }


def test_a_run_uploads_its_adapter(options, tmp_path):
    """It is published after the last step; a public repository only if that is asked for."""
    wanted = ["--hub.push=me/dog", "--hub.public", "--hub.license=mit", "--steps=1"]
    wanted += ["--sample.every=1", "--sample.num_inference_steps=1"]
    with fake_hub() as hub:
        result = launched([*options, *wanted], online(hub, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert "uploaded to https://huggingface.co/me/dog" in result.stdout
    assert hub.created["visibility"] == "public"
    adapter = (tmp_path / "out" / "lora.safetensors").read_bytes()
    assert hub.files["lora.safetensors"] == adapter
    assert b"license: mit" in hub.files["README.md"]
    assert json.loads(hub.files["workflow.json"])["nodes"]
    assert hub.requests[0] == ("GET", "/api/whoami-v2"), "asked before training"


def test_a_wrong_token_is_said_before_training(options, tmp_path):
    with fake_hub() as hub:
        result = launched(
            [*options, "--hub.push=me/dog"], online(hub, tmp_path / "home", token=TOKEN)
        )
    assert result.returncode == 2
    assert result.stderr.endswith(
        "error: --hub.push me/dog: the Hub does not accept the token. Use `hf auth login` again\n"
    )
    assert not (tmp_path / "out" / "lora.safetensors").exists()


def test_an_offline_run_writes_the_folder(options, run_here, tmp_path, capsys):
    assert run_here([*options, "--hub.push=me/dog", "--steps=1"]) == 0
    captured = capsys.readouterr()
    assert (
        "HF_HUB_OFFLINE is set: at the end the folder for the Hub is only written" in captured.out
    )
    assert "To upload it: hf upload me/dog" in captured.out
    assert "not uploaded" not in captured.err
    assert not (tmp_path / "out" / "hub" / "workflow.json").exists(), "its prompt is a caption"
    assert (tmp_path / "out" / "hub" / "lora.safetensors").is_file()


def test_a_wrong_repository_is_an_error_of_the_options(options, run_here, capsys):
    assert run_here([*options, "--hub.push=dog", "--tracking.artifacts"]) == 2
    error = capsys.readouterr().err
    assert "--hub.push dog: expected user/name" in error
    assert "--tracking.artifacts: only W&B stores artifacts" in error


def test_a_card_that_nobody_edited_is_written_again(options, run_here, tmp_path):
    """With --overwrite, and when a run is resumed; files of earlier formats are left out."""
    offline = [*options, "--hub.push=me/dog", "--sample.every=1", "--sample.num_inference_steps=1"]
    hub = tmp_path / "out" / "hub"
    assert run_here([*offline, "--steps=1", "--export.formats", "kohya", "peft"]) == 0
    assert (hub / "lora.peft").is_dir()
    assert run_here([*offline, "--steps=2", "--export.formats", "kohya", "diffusers"]) == 0
    card = (hub / "README.md").read_text()
    assert "| `steps` | 2 |" in card
    assert 'weight_name="lora.diffusers.safetensors"' in card
    assert "copy `lora.safetensors` into" in card
    assert not (hub / "lora.peft").exists()
    for entry in ModelCard(card).data.to_dict()["widget"]:
        assert (hub / entry["output"]["url"]).is_file()
    more = ["--overwrite", "--rank=2", "--steps=1", "--export.formats", "kohya"]
    assert run_here([*offline, *more]) == 0
    assert "| `rank` | 2 |" in (hub / "README.md").read_text()
    assert not (hub / "lora.diffusers.safetensors").exists()


def test_trigger_words_of_any_letters(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "lora.safetensors").write_bytes(b"weights")
    write_facts(folder, ["a"], trigger_words='a "b" `c`')
    assert push(folder, "--no_upload") == 0
    card = (folder / "hub" / "README.md").read_text()
    assert """Trigger words: `` a "b" `c` ``""" in card
    (line,) = [line for line in card.splitlines() if line.startswith("pipeline(")]
    call = line.split(").images")[0].removeprefix("pipeline(")
    assert json.loads(call) == 'a "b" `c`'


@pytest.mark.parametrize(
    "name", ["me/my--dog", "me/dog.", "me/dog.git", "me/k\u00e4fer", "-u/dog", "me/" + "d" * 100]
)
def test_names_that_the_hub_refuses(name):
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert repo_error(name)
    assert repo_error("user-1/my_dog.v2-x") is None
