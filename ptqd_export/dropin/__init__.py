"""A bundle in pipelines of diffusers. Needs torch and diffusers."""

from .scheduler import PtqdScheduler
from .unet import PtqdUNet

__all__ = ["PtqdScheduler", "PtqdUNet"]
