"""WAN 2.1 videos."""
