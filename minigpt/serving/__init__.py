"""A model behind HTTP: OpenAI's API, and a page to talk to it."""
