"""varlab: training, scaling and measuring visual autoregression by next-scale prediction (VAR, arXiv 2404.02905)."""

__version__ = "0.1.0"
