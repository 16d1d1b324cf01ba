"""A bundle in pipelines of diffusers. Needs torch and diffusers."""

from .unet import PtqdUNet

__all__ = ["PtqdUNet"]
