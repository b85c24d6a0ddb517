"""Evaluation: predictions and their scores, the HTML page, and LLM as a judge."""
