"""Source: a model as its files hold it, whatever their layout; all later stages see this one kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .network import Network


@dataclass(frozen=True)
class Source:
    """What a model consists of. What is large beside the UNet is read when it is asked for.

    Attributes:
        network: the UNet with its inputs and its scheduler config.
        read_first_stage: reads the autoencoder, or None for a model of pixels.
        scaling_factor: latents are the autoencoder's times this, less `shift_factor` before.
        read_text_state: reads the weights of a CLIP text encoder in a single file, by transformers' names.
        text_encoders: folders of text encoders, in the order of the pipeline.
        tokenizers: folders of their tokenizers.
        force_zeros: zeros stand for no text where no negative prompt is given, not the empty prompt's
            embedding.
    """

    network: Network
    read_first_stage: Callable[[], nn.Module] | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    read_text_state: Callable[[], dict[str, Tensor]] | None = None
    text_encoders: tuple[Path, ...] = ()
    tokenizers: tuple[Path, ...] = ()
    force_zeros: bool = False
