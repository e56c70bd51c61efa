"""The server: OpenAI's routes over one engine, with limits, keys, metrics, sessions and a chat page."""
