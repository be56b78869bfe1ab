"""What leaves the worker: assets, callbacks, and what is kept to be sent again."""
