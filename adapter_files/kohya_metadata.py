"""What the metadata of an adapter file say of the adapter itself. Without the data's modules, which
load slowly."""

import json

from adapter_files import files
from adapter_files.peft_config import has_rank, rank_of
from lora_algos.attach import algorithm_of

TOTAL_STEPS = "train_lora.total_steps"
"""Metadata key: steps for which the adapter was trained, including those of an earlier adapter."""


def network_metadata(layers: files.Layers) -> dict[str, str]:
    """What the adapter is, in kohya's words: of LoRA and DoRA its own scripts, of all else
    LyCORIS'."""
    algorithms = sorted({algorithm_of(tensors) for tensors in layers.values()})
    ranks = [rank_of(tensors) for tensors in layers.values() if has_rank(tensors)]
    alphas = [
        float(tensors["alpha"])
        for tensors in layers.values()
        if has_rank(tensors) and "alpha" in tensors
    ]
    args = {} if algorithms == ["LoRA"] else {"algo": ",".join(name.lower() for name in algorithms)}
    return {
        "ss_network_module": "networks.lora"
        if {*algorithms} <= {"LoRA", "DoRA"}
        else "lycoris.kohya",
        "ss_network_dim": str(max(ranks, default=0)),
        "ss_network_alpha": str(alphas[0] if alphas else 0.0),
        "ss_network_args": json.dumps(args),
    }
