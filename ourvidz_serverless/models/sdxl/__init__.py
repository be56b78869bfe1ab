"""SDXL pictures."""
