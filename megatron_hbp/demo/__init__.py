"""The demo: real text, two small models, naive packing against HBP."""
