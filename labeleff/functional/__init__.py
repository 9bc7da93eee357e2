"""The maths of each method as pure functions of tensors: one file per paper, and what several share.

Shapes: B batch, K classes, *S one to three spatial axes. Everything is computed in float32.
"""
