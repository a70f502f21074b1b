"""Metadata that describes the adapter itself, in the words of kohya's scripts and LyCORIS.

This module imports nothing of data/, which loads slowly.
"""

import json

from lora_algos.detection import detect_algorithm
from lora_algos.tensors import ALPHA
from lora_algos.traits import Layers

TOTAL_STEPS = "train_lora.total_steps"
"""Metadata key: steps for which the adapter was trained, including those of an earlier adapter."""
KOHYA_MODULE, LYCORIS_MODULE = "networks.lora", "lycoris.kohya"
DEFAULT_ALGO = "lora"
"""Word for an algorithm that needs no argument of the module."""


def network_metadata(layers: Layers) -> dict[str, str]:
    """Return the module, rank, alpha and arguments with which other programs train such a file."""
    modules, algos = set(), set()
    ranks, alphas = [], []
    for tensors in layers.values():
        algorithm = detect_algorithm(tensors)
        traits = algorithm.traits
        modules.add(traits.files.kohya_module)
        algos.add(traits.files.kohya_algo or algorithm.name.lower())
        rank = traits.nominal_rank(tensors)
        if rank is None:
            continue
        ranks.append(rank)
        if ALPHA in tensors:
            alphas.append(float(tensors[ALPHA]))
    is_kohya_module = modules <= {KOHYA_MODULE}
    return {
        "ss_network_module": KOHYA_MODULE if is_kohya_module else LYCORIS_MODULE,
        "ss_network_dim": str(max(ranks, default=0)),
        "ss_network_alpha": str(alphas[0] if alphas else 0.0),
        "ss_network_args": json.dumps(network_arguments(algos)),
    }


def network_arguments(algos: set[str]) -> dict[str, str]:
    """Return the arguments of the module that trains these algorithms."""
    if algos == {DEFAULT_ALGO}:
        return {}
    return {"algo": ",".join(sorted(algos))}
