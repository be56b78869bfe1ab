"""HTTP requests that end, and only to hosts that they may reach."""
