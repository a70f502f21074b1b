"""Modular pipelines of diffusers, which are called here like its other pipelines.

A modular pipeline runs steps over one state. Its call has no signature, its text encoding is no
method, and loading reports no errors. Importing this module imports diffusers' steps.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    PipelineState,
)
from torch import nn

from models.checkpoint_files import component_folder, weight_files

Steps = dict[str, Any]
"""Name of a step, with those of the blocks around it -> the step."""
CALLBACK = "callback_on_step_end"
"""Argument of a call: a function that is called after each denoising step."""


class Workflow(NamedTuple):
    """The steps of a modular pipeline that a family uses."""

    name: str = "text2image"
    """diffusers' name of the workflow."""
    text_steps: tuple[str, ...] = ("text_encoder",)
    """Steps that encode prompts."""
    skipped_steps: tuple[str, ...] = ()
    """Beginnings of the names of steps that are left out."""


class CallablePipeline(ModularPipeline):
    """A modular pipeline with the methods of diffusers' other pipelines that this program calls."""

    used_workflow: ClassVar[Workflow]

    def __init__(self, source: str | None = None):
        """`source`: a folder or Hub id, whose index is read."""
        blocks = default_blocks(type(self))
        super().__init__(blocks, source)
        steps = steps_of(blocks, self.used_workflow)
        text_steps = self.used_workflow.text_steps
        self._text_steps = {name: steps.pop(name) for name in text_steps}
        self._drawing_steps = steps

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *_: Any, **arguments: Any
    ) -> "CallablePipeline":
        """Load the components that are not among the arguments, as other pipelines do.

        `dtype`: by component, with a default. Raises the error of a component that fails."""
        source = pretrained_model_name_or_path
        dtypes = arguments.pop("dtype")
        variant = arguments.pop("variant")
        use_safetensors = arguments.pop("use_safetensors")
        local_files_only = arguments.pop("local_files_only")
        pipeline = cls(source)
        components = dict(arguments)
        for name in pipeline.pretrained_component_names:
            if name in components:
                continue
            spec = pipeline.get_component_spec(name)
            options: dict[str, Any] = {  # an index may name other places
                "pretrained_model_name_or_path": source,
                "subfolder": name,
                "local_files_only": local_files_only,
            }
            if spec.type_hint is None or issubclass(spec.type_hint, nn.Module):
                options["dtype"] = dtypes.get(name, dtypes["default"])
                options["use_safetensors"] = use_safetensors
                options["variant"] = existing_variant(source, name, variant)
            components[name] = spec.load(**options)
        pipeline.register_modules(**components)
        return pipeline

    def register_modules(self, **components: Any) -> None:
        """Set components of the pipeline. None leaves a component unchanged."""
        known = {
            name: component
            for name, component in components.items()
            if component is not None and name in self.components
        }
        self.update_components(**known)

    def set_progress_bar_config(self, **_: Any) -> None:
        """Do nothing: calls show no progress bars."""

    def save_pretrained(self, save_directory: Any, *_: Any, **options: Any) -> None:
        """Save all components, with an index that names no path of this machine."""
        super().save_pretrained(str(save_directory), overwrite_modular_index=True, **options)
        index_path = Path(save_directory) / self.config_name
        text = index_path.read_text(encoding="utf-8")
        index = json.loads(text)
        for entry in index.values():
            if not isinstance(entry, list):  # of no component
                continue
            place = entry[2]["pretrained_model_name_or_path"]
            if place is not None and Path(place).is_dir():  # a Hub id stays
                entry[2]["pretrained_model_name_or_path"] = (
                    None  # diffusers looks next to the index
                )
        text = json.dumps(index, indent=2)
        index_path.write_text(text, encoding="utf-8")

    def encode_prompt(self, **inputs: Any) -> dict[str, Any]:
        """Return what the text steps make for the other steps, by name."""
        state = PipelineState()
        for name, value in inputs.items():
            state.set(name, value)
        state = self._run(self._text_steps, state)
        used_names = input_names(self._drawing_steps)
        return {name: state.get(name) for name in self._text_outputs() if name in used_names}

    def _text_outputs(self) -> dict[str, Any]:
        """Return the names of what the text steps make, with diffusers' group of each, or None."""
        outputs = {}
        for step in self._text_steps.values():
            for output in step.intermediate_outputs:
                outputs[output.name] = output.kwargs_type
        return outputs

    def draw(self, inputs: dict[str, Any]) -> PipelineState:
        """Return the state after a call with these arguments. It has `images`.

        Raises TypeError for an argument that no step takes."""
        known_names = {*call_names(type(self))}
        for name in inputs:
            if name not in known_names:
                raise TypeError(f"{type(self).__name__} takes no argument {name}")
        callback = inputs.pop(CALLBACK, None)
        text_names = input_names(self._text_steps)
        encoded = self.encode_prompt(
            **{name: value for name, value in inputs.items() if name in text_names}
        )
        state = PipelineState()
        for name, value in inputs.items():
            state.set(name, value)
        groups = self._text_outputs()
        for name, value in encoded.items():
            state.set(name, value, groups[name])
        with self._reporting(callback):
            return self._run(self._drawing_steps, state)

    def _run(self, steps: Steps, state: PipelineState) -> PipelineState:
        """Run steps one by one. diffusers' own lists of steps print every error that ends them."""
        with torch.no_grad():
            for step in steps.values():
                _, state = step(self, state)
        return state

    @contextmanager
    def _reporting(self, callback: Callable[..., Any] | None) -> Iterator[None]:
        """Call a function after each denoising step in a block; show no progress bars."""
        loops: list[Any] = []
        for step in self._drawing_steps.values():
            if isinstance(step, LoopSequentialPipelineBlocks):
                loops.append(step)
        report = StepReport(self, callback)
        for loop in loops:
            loop.progress_bar = report.started
        try:
            yield
        finally:
            for loop in loops:
                del loop.progress_bar


class StepReport:
    """A progress bar that shows nothing. It calls a function after each denoising step."""

    def __init__(self, pipeline: CallablePipeline, callback: Callable[..., Any] | None):
        self.pipeline, self.callback = pipeline, callback
        self.num_steps = 0

    def started(self, **_: Any) -> "StepReport":
        """Return the progress bar of a loop that begins."""
        return self

    def __enter__(self) -> "StepReport":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self) -> None:
        """Call the function, with the arguments of other pipelines."""
        if self.callback is not None:
            self.callback(self.pipeline, self.num_steps, None, {})
        self.num_steps += 1


def default_blocks(pipeline_class: type[ModularPipeline]) -> Any:
    """Return the blocks that a class of pipelines has unless an index names others."""
    return getattr(diffusers, str(pipeline_class.default_blocks_name))()


def steps_of(blocks: Any, workflow: Workflow) -> Steps:
    """Return the steps of a workflow, in their order."""
    steps = blocks.get_workflow(workflow.name).sub_blocks
    return {
        name: step for name, step in steps.items() if not name.startswith(workflow.skipped_steps)
    }


def input_names(steps: Steps) -> set[str]:
    """Return the names of all that some steps take."""
    names = set()
    for step in steps.values():
        names |= {parameter.name for parameter in step.inputs if parameter.name is not None}
    return names


def call_names(pipeline_class: type[CallablePipeline]) -> list[str]:
    """Return the names of the arguments of a call."""
    steps = steps_of(default_blocks(pipeline_class), pipeline_class.used_workflow)
    return sorted({*input_names(steps), CALLBACK})


def existing_variant(source: str, component: str, variant: str | None) -> str | None:
    """Return the variant if a component has such weights; else None, as in other pipelines."""
    if variant is None:
        return None
    files = sorted(component_folder(source, component).glob("*"))
    return variant if weight_files(files, variant) else None


@cache
def callable_class(pipeline_name: str, workflow: Workflow) -> type[CallablePipeline]:
    """Return diffusers' class of a modular pipeline, with the methods of other pipelines."""

    def call(self: CallablePipeline, **inputs: Any) -> PipelineState:
        return self.draw(inputs)

    parents = (CallablePipeline, getattr(diffusers, pipeline_name))
    # diffusers writes the name of the class into the index
    pipeline_class = type(pipeline_name, parents, {"used_workflow": workflow, "__call__": call})
    vars(call)["__signature__"] = signature_of(call_names(pipeline_class))
    return pipeline_class


def signature_of(names: Iterable[str]) -> Signature:
    """Return the signature of a method with these arguments, by which callers look for some."""
    parameters = [Parameter("self", Parameter.POSITIONAL_ONLY)]
    for name in names:
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None))
    return Signature(parameters)
