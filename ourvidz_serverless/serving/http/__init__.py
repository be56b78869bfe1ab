"""The HTTP application of a load-balancing endpoint, a pod and a laptop."""
