"""The commands on docs/formats.md run, and print tables like those on the page."""

import re
import shlex

from helpers.adapter_file_cases import base, trained
from helpers.project import PROJECT
from helpers.tool_cases import adapter_file, run

from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers
from tools.options import OPTIONS

PAGE = (PROJECT / "docs" / "formats.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### (\w+)\n\n```bash\n(.*?)```\n\n```\n(.*?)```", PAGE, re.M | re.S)


def test_every_tool_is_on_the_page():
    assert [name for name, _, _ in SECTIONS] == list(OPTIONS)


def test_the_commands_run_and_print_such_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "demo").mkdir(parents=True)
    (tmp_path / "examples").symlink_to(PROJECT / "examples")
    adapter_file(
        tmp_path / "output" / "demo" / "lora.safetensors",
        trained(dict.fromkeys(adaptable_layers(base()), LayerSpec(2, 2.0))),
    )
    for name, commands, shown in SECTIONS:
        for command in commands.splitlines():
            words = shlex.split(command)
            assert words[:3] == ["python", "train_lora.py", name]
            assert run(*words[2:]) == 0, command
            lines = capsys.readouterr().out.splitlines()
            table = shown[shown.index("block ") :].splitlines()
            assert table[0].split() in [line.split() for line in lines], command
            assert {line.split()[0] for line in table} <= {line.split()[0] for line in lines}
    assert {path.name for path in (tmp_path / "output").iterdir()} >= {
        "merged",
        "small.safetensors",
        "lora.peft",
    }
