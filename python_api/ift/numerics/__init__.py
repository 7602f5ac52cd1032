"""What the numbers of this package are worth: exact formulas, the bounds promised, errors measured.

``ift numerics`` and the property tests share `oracle` and `bounds`.
"""
