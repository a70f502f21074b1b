"""The text connectors of LTX-2 as part of the text encoder.

The pipeline would give the states of all layers of Gemma 3 to the connectors when it draws. These
states are 0.4 GB per caption; what the connectors make of them is 16 MB.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ConnectedEncoder(nn.Module):
    """Gemma 3 followed by the connectors, in the place of a pipeline's text encoder.

    Its only hidden state is (B, L, D): the embeddings for the video and those for the audio, in a
    row."""

    def __init__(self, encoder: Any, connectors: Any):
        super().__init__()
        self.encoder = encoder
        self.connectors = connectors

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        return self.connectors.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = True,
    ) -> Any:
        """Return the output of transformers' encoders. The padding of a caption is on the left."""
        from transformers.modeling_outputs import BaseModelOutput

        output = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
        )
        captions = zip(*output.hidden_states, strict=True)
        rows = []
        # one by one, because connectors copy the states of all layers several times
        for layer_states, mask in zip(captions, attention_mask, strict=True):
            states = torch.stack(layer_states, -1).to(self.dtype)
            video_embeds, audio_embeds, _ = self.connectors(
                states[None],
                mask[None],
            )
            embeds = torch.cat([video_embeds, audio_embeds], -1)
            rows.append(embeds)
        all_embeds = torch.cat(rows)
        return BaseModelOutput(hidden_states=(all_embeds,))


class SplitEmbeds:
    """Splits what a ConnectedEncoder makes, in the place of a pipeline's connectors."""

    def __init__(self, video_width: int):
        self.video_width = video_width

    def __call__(
        self, embeds: Tensor, attention_mask: Tensor, padding_side: str = "left"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings for the video, those for the audio, and a mask that hides none."""
        video_embeds = embeds[..., : self.video_width]
        audio_embeds = embeds[..., self.video_width :]
        return video_embeds, audio_embeds, torch.ones_like(attention_mask)
