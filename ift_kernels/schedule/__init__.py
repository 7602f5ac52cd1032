"""Schedules: products of the head tile by tile, whichever backend has the epilogues."""
