"""Make or update an endpoint on RunPod with one command: `python -m builder.deploy --help`."""
