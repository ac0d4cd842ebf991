"""One model behind an OpenAI-compatible endpoint, with a chat page and a terminal chat on it.

`engine` says what an engine is and knows nothing of HTTP; `api` knows nothing of torch; the page (`ui`) and the
terminal chat (`chat`) reach the model over HTTP like every client.
"""
