"""OpenAI's protocol: its calls become payloads, and documents become its answers.

Nothing here knows how a call came in: `serving/http` and `serving/runpod_queue` both use it.
"""
