"""Measurements, and the baselines that they and the tests compare with."""
