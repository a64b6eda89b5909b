"""Choosing tiers."""
