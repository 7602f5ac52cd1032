"""Leaves: imported by every layer, importing none of them."""
