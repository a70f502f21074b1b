"""ModularFamily: a family that diffusers has a modular pipeline for, and no other.

`pipelines` names classes such as AnimaModularPipeline. Where a family derives from another class
too, it names this one first.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from models.diffusers_family import DiffusersFamily
from models.guiders import set_guider
from models.quiet import hide_guider_notes


class ModularFamily(DiffusersFamily):
    """A family whose pipeline runs steps. Guidance is a component of the pipeline, its guider."""

    text_steps: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Steps of the pipeline that encode prompts, by diffusers' names."""
    skipped_steps: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of steps that are left out."""

    @property
    def pipeline_class(self) -> Any:
        from models.modular_pipeline import Workflow, callable_class  # imports all steps

        hide_guider_notes()  # each pipeline makes a guider
        workflow = Workflow(text_steps=self.text_steps, skipped_steps=self.skipped_steps)
        return callable_class(self.pipelines[0], workflow)

    def make_pipeline(self, modules: Mapping[str, Any]) -> Any:
        with unset_fake_temporarily(), torch.device("cpu"):
            pipeline = self.pipeline_class()  # may make a scheduler, which reads values
        pipeline.register_modules(**modules)
        return pipeline

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {}

    def set_guidance(self, pipeline: Any, scale: float) -> None:
        set_guider(pipeline, scale)
