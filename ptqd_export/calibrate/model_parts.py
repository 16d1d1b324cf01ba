"""ModelParts: a model as its files hold it, whatever their layout; all later stages see this one kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .network import Network


@dataclass(frozen=True)
class ModelParts:
    """What a model consists of. What is large beside the UNet is read when it is asked for.

    Attributes:
        network: the UNet with its inputs and its scheduler config.
        unet_config: the UNet's diffusers config; `attention_heads` besides where one head count holds for
            all levels, which no config of diffusers says.
        read_first_stage: reads the autoencoder, or None for a model of pixels.
        first_stage_config: its diffusers config; empty for a model of pixels.
        scaling_factor: latents are the autoencoder's times this, less `shift_factor` before.
        read_text_state: reads the weights of a CLIP text encoder in a single file, by transformers' names.
        text_encoders: folders of text encoders, in the order of the pipeline.
        tokenizers: folders of their tokenizers.
        files: the files that the UNet was read from.
    """

    network: Network
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    read_first_stage: Callable[[], nn.Module] | None = None
    first_stage_config: Mapping[str, Any] = field(default_factory=dict)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    read_text_state: Callable[[], dict[str, Tensor]] | None = None
    text_encoders: tuple[Path, ...] = ()
    tokenizers: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()

    def first_stage(self) -> FirstStage | None:
        """The decoder of latents to pictures; None for a model of pixels.

        Raises:
            ModelError: its files are missing or damaged.
        """
        if self.read_first_stage is None:
            return None
        return FirstStage(self.read_first_stage(), self.scaling_factor, self.shift_factor)


class FirstStage(nn.Module):
    """An autoencoder of diffusers with the scale of its latents.

    Args:
        autoencoder: AutoencoderKL or VQModel; the latter quantizes latents once more when it decodes.
        scaling_factor: latents of the sampler are (encoded - shift_factor) * scaling_factor.
    """

    def __init__(self, autoencoder: nn.Module, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, f H, f W), about -1 to 1, not clamped, of the sampler's latents (B, C, H, W)."""
        decode: Callable[..., tuple[Tensor, ...]] = self.autoencoder.decode  # type: ignore[assignment]
        return decode(latents / self.scaling_factor + self.shift_factor, return_dict=False)[0]

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(latents)
