"""Samples into packs."""
