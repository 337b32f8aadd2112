"""Optimizers for large batches and whole matrices that torch has not, as plain torch optimizers.

They know nothing of ranks: any plan steps them as it steps every optimizer.
"""

from meshwright.optim.lamb import LAMB
from meshwright.optim.lars import LARS
from meshwright.optim.shampoo import Shampoo

__all__ = ["LAMB", "LARS", "Shampoo"]
