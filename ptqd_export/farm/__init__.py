"""Many machines: samples of a bundle as shards, by workers on Ray; the same ones whoever draws them."""

from .farm import Sharded, sample_shards
from .folder import Index
from .order import Content, Format, Order
from .pool import LOCAL, Pool, connect

__all__ = ["LOCAL", "Content", "Format", "Index", "Order", "Pool", "Sharded", "connect", "sample_shards"]
