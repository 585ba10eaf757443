"""Data sets: CIFAR-10, a sample of it, and your own."""

from normlab.data.cifar10.cache import Info, Verified, info, verify
from normlab.data.cifar10.fetching import Fetched, fetch
from normlab.data.images import ImageData
from normlab.data.loading import load

__all__ = ["Fetched", "ImageData", "Info", "Verified", "fetch", "info", "load", "verify"]
