"""How long a test waits for what has to come: so long that no slow machine is taken for a fault."""

PATIENCE_S = 150.0
