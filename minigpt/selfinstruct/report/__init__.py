"""The report of a self-instruct run: data, figures and web page."""
