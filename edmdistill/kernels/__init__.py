"""Compute kernels: the operations that networks are written in, one file each.

Networks use no other arithmetic, so a fused kernel or a tangent rule of an operation reaches all of them. Weights are
kept in float32 and cast to the dtype of the activations inside the operation.
"""

# All of them, so that a Dual has every rule.
from edmdistill.kernels import attention, dropout, dual, group_norm, linear, magnitude, resampling, winograd

__all__ = ["attention", "dropout", "dual", "group_norm", "linear", "magnitude", "resampling", "winograd"]
