"""The other sides of the worker, as real processes and servers that behave as they do.

`platform` is RunPod, `worker` a worker's own process, `receivers` the edge function and Supabase
Storage, `s3` an S3 server. All of them listen on 127.0.0.1 and pick their own ports.
"""
