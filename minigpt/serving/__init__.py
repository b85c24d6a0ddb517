"""An HTTP server: OpenAI's API and a chat page."""
