"""Compute kernels: the operations that networks are written in.

A network uses these and no other arithmetic, so that what an operation learns (a fused kernel, a tangent) every network
has. Weights are kept in float32 and are cast to the dtype of the activations here, at the operation.
"""
