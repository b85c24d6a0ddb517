"""The report on a self-instruct run: its data, figures and page."""
