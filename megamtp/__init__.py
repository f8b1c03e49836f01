"""megamtp pretrains multi-token-prediction language models (arXiv:2404.19737) on DeepSpeed.

Start reading in model/mtp.py.
"""

__version__ = "0.1.0"
