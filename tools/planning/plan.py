"""`plan`: prints the memory of a run, phase by phase, before anything is loaded."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from common.errors import UserError
from models.released import configuration_folder, find_released_model
from tools.planning.options import PlanOptions
from tools.planning.report import Plan, plan_as_json, plan_as_text
from training.config import TrainConfig


def run(options: PlanOptions) -> int:
    """Print the plan of a run; return the exit code."""
    from training.memory.budget import LEAST_CHANGES, fit_into
    from training.memory.planner import MemoryPlanner

    with (
        redirect_stdout(sys.stderr),  # the output is the plan alone
        on_the_cpu(),
        with_configurations(options.config) as config,
    ):
        planner = MemoryPlanner(config, is_gpu=options.device == "gpu")
        phases = planner.phases()
        fit = full_fit = None
        budget = config.memory.budget_bytes
        if budget is not None:
            fit = fit_into(budget, planner, phases, config.memory.allow)
            if not fit.fits:
                full_fit = fit_into(budget, planner, phases, LEAST_CHANGES)
    plan = Plan(phases, fit, full_fit, planner.reserve)
    if options.json:
        print(json.dumps(plan_as_json(plan), indent=2))
    else:
        print(plan_as_text(options.config, planner, plan))
    return plan.exit_code


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Let Accelerate use no device, and leave the environment as it was."""
    name = "ACCELERATE_USE_CPU"
    previous_value = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
        if previous_value is not None:
            os.environ[name] = previous_value


@contextmanager
def with_configurations(config: TrainConfig) -> Iterator[TrainConfig]:
    """Yield the config with a local model: a folder of configurations for a released model.

    Errors in the block name the Hub id instead of the folder."""
    with ExitStack() as stack:
        hub_ids: dict[str, str] = {}
        model = config.model
        for option in ("path", "config"):
            hub_id = getattr(model, option)
            released_model = find_released_model(hub_id)
            if released_model is None:
                continue
            folder = str(stack.enter_context(configuration_folder(released_model)))
            hub_ids[folder] = hub_id
            change: dict[str, Any] = {option: folder}
            model = replace(model, **change, variant=None)
        try:
            yield replace(config, model=model)
        except UserError as error:
            message = str(error)
            for folder, hub_id in hub_ids.items():
                message = message.replace(folder, hub_id)
            raise type(error)(message) from error
