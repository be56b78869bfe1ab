"""Qwen chat."""
