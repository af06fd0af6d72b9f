"""Train and fine-tune Segment Anything 2.1 on video, in JAX."""

__version__ = "0.1.0"
