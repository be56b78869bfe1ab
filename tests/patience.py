"""How long a test waits for an event, in seconds: long enough for a slow machine."""

PATIENCE_S = 150.0
