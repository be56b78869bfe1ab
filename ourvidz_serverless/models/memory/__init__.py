"""Which models are on the device, in the host's memory and on the disk."""
