"""One RunPod serverless handler for generative media: SDXL images, Qwen chat, WAN 2.1 video."""

__version__ = "0.1.0"
