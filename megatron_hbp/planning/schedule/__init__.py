"""Packs into steps, slots and ranks."""
