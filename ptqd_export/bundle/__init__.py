"""The bundle: what is in one, how it is written, read and checked."""

from .bundle import Bundle, check_target, write_manifest
from .manifest import Manifest

__all__ = ["Bundle", "Manifest", "check_target", "write_manifest"]
