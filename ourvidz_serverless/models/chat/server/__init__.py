"""Chat by a server that speaks OpenAI's protocol: vLLM, SGLang, TGI and others.

    loader       starts the server if it has to, and finds its models
    process      the server as a child of this worker
    guard        runs between the two, so that no process outlives the worker
    server_log   which of the server's lines are logged
    model        `ServerChat`, the `TextModel` that jobs call
    replies      one reply: its stream, its end, its failures
    truncation   `truncate`: which messages go
    translation  our fields in the server's words
    client       HTTP

Nothing here imports torch.
"""
