"""What makes a denoising network faster."""
