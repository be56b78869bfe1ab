"""Ways in: RunPod's queue, HTTP, and the application's Redis lists."""
