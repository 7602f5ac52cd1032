"""Operators of `torch.library` and their autograd formulas."""
