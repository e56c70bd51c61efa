"""Requests in, tokens out: prefill, decode, sampling, streaming and sessions."""
