"""The chat page: HTML, CSS and JavaScript as they are written, sent as one self-contained response."""
